"""Linear layers of members W + s Z: the kernel, interpreted where there is no GPU, and its plain twin."""

import pytest
import torch
from torch.func import vmap

from zoo_hf.kernels.choice import VARIABLE
from zoo_hf.kernels.linear import fits, form_of, perturbed_linear, perturbed_linear_population
from zoo_hf.noise import Direction, entries

from .conftest import CLOSE, DEVICE, every_backend, every_dtype


NAME = {"seed": 2**32 - 1, "step": 2**32 - 7, "name": "head.weight"}


def made(rng, members, rows, inputs, outputs, dtype=torch.float32):
    """x, W, b, and the members' indices, of which two are equal, and scales, powers of two; y is of size 1."""
    x = torch.randn(members, rows, inputs, generator=rng)
    weight = torch.randn(outputs, inputs, generator=rng) * max(1, inputs) ** -0.5
    bias = torch.randn(members, outputs, generator=rng)
    index = (torch.arange(members) + 1) // 2 + 2**32 - 2
    scale = 2.0**-5 * (-1.0) ** torch.arange(members)
    return [*(each.to(DEVICE, dtype) for each in (x, weight, bias)), index.to(DEVICE), scale.to(DEVICE)]


def displaced(weight, index, scale):
    """W + s Z of a member, in float64."""
    z = entries(
        Direction(NAME["seed"], NAME["step"], int(index)), NAME["name"], 0, weight.numel(), dtype=torch.float64
    )
    return weight.double() + scale * z.view(weight.shape).to(weight.device)


def expected(x, weight, bias, index, scale, *, rounded=False):
    """The outputs in float64, from members' matrices that may be rounded to the dtype of W."""
    matrices = torch.stack([displaced(weight, i, s) for i, s in zip(index, scale, strict=True)])
    y = x.double() @ (matrices.to(weight.dtype).double() if rounded else matrices).mT
    return y if bias is None else y + bias.double()[:, None]


def closeness(dtype, kernels):
    """Sums of float32 in another order, rounded once; the twin's products are rounded too, and then their sum."""
    if dtype is torch.float32:
        return CLOSE
    rounding = torch.finfo(dtype).eps / 2
    return {"rtol": rounding, "atol": 3 * 4 * rounding if kernels == "plain" else CLOSE["atol"]}


@pytest.fixture
def multiplied(run_by):
    """`multiplied(kernels, arguments, form)`: the outputs of a backend."""

    def multiply(kernels, arguments, form="apart"):
        return run_by(kernels, perturbed_linear_population, *arguments, **NAME, form=form)

    return multiply


@every_backend
@every_dtype
@pytest.mark.parametrize("form", ["apart", "fused"])
@pytest.mark.parametrize(
    ("members", "rows", "inputs", "outputs"),
    [(3, 5, 256, 130), (2, 70, 192, 33), (1, 20, 101, 20), (2, 67, 75, 9), (2, 130, 40, 7), (2, 260, 128, 3)],
)
def test_outputs_are_those_of_the_members_matrices(
    multiplied, rng, kernels, dtype, form, members, rows, inputs, outputs
):
    arguments = made(rng, members, rows, inputs, outputs, dtype)
    y = multiplied(kernels, arguments, form)
    # where rows are few, the kernel accumulates apart in either form, which is closer to the truth
    rounded = form == "fused" and (kernels == "plain" or rows > 64)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected(*arguments, rounded=rounded), **closeness(dtype, kernels))


@every_backend
@pytest.mark.parametrize("rows", [4, 66])
def test_strides_do_not_matter(multiplied, rng, kernels, rows):
    x, weight, bias, index, scale = made(rng, 2, rows, 64, 20)
    for other in (
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([x, x], dim=-1)[..., :64],
    ):
        assert not other.is_contiguous()
        found = multiplied(kernels, (other, weight, bias, index, scale))
        torch.testing.assert_close(found, multiplied(kernels, (x, weight, bias, index, scale)), rtol=0, atol=1e-6)
    shared = x[:1].expand(2, rows, 64), weight.mT.contiguous().mT, bias[0].expand(2, 20), index, scale
    truth = expected(*shared)
    torch.testing.assert_close(multiplied(kernels, shared).double(), truth, **closeness(torch.float32, kernels))


@every_backend
@pytest.mark.parametrize("form", ["apart", "fused"])
@pytest.mark.parametrize("rows", [4, 66])
def test_wider_weights_are_rounded_to_the_dtype_of_the_inputs(multiplied, rng, kernels, form, rows):
    x, weight, bias, index, scale = made(rng, 2, rows, 128, 20, torch.bfloat16)
    # exact in bfloat16, which the interpreter would cut off instead of rounding
    y = multiplied(kernels, (x, weight.float(), bias, index, scale), form)
    truth = expected(x, weight, bias, index, scale)
    torch.testing.assert_close(y.double(), truth, **closeness(torch.bfloat16, kernels))


@every_backend
def test_a_scale_far_below_the_spacing_of_the_weights_is_not_lost(multiplied, rng, kernels):
    x, weight, _, index, _ = made(rng, 2, 66, 256, 30, torch.float16)
    weight = 64 * torch.ones_like(weight)  # 2⁻⁴ apart
    x[:, :, 1::2] = -x[:, :, ::2]  # so that x Wᵀ is 0
    scale = torch.tensor([1e-3, -1e-3], device=DEVICE)
    y = multiplied(kernels, (x, weight, None, index, scale))
    torch.testing.assert_close(y.double(), expected(x, weight, None, index, scale), rtol=1e-2, atol=1e-5)
    assert torch.equal(displaced(weight, index[0], scale[0]).half(), weight)


@every_backend
@pytest.mark.parametrize("shape", [(0, 5, 64, 20), (2, 0, 64, 20), (2, 5, 64, 0), (2, 5, 0, 20)], ids=str)
def test_nothing_gives_nothing_and_no_inputs_give_the_bias(multiplied, rng, kernels, shape):
    arguments = made(rng, *shape)
    y = multiplied(kernels, arguments)
    assert y.shape == (*shape[:2], shape[3])
    assert torch.equal(y, arguments[2][:, None].expand_as(y))


@every_backend
@pytest.mark.parametrize("batched", [True, False])
def test_under_vmap_a_member_is_one_of_the_population(monkeypatch, rng, kernels, batched):
    monkeypatch.setenv(VARIABLE, kernels)
    x, weight, bias, index, scale = made(rng, 3, 10, 64, 20)
    truth = expected(x if batched else x[:1].expand_as(x), weight, bias if batched else None, index, scale)

    def layer(x, bias, index, scale):
        return perturbed_linear(x, weight, bias, index, scale, **NAME, form="apart")

    inner = x.unflatten(1, (2, 5)).movedim(0, 2) if batched else x[0].unflatten(0, (2, 5))
    dims = (2, 1, 0, 0) if batched else (None, None, 0, 0)
    y = vmap(layer, in_dims=dims, out_dims=1)(inner, bias.mT if batched else None, index, scale)
    assert y.shape == (2, 3, 5, 20)
    torch.testing.assert_close(y.movedim(1, 0).flatten(1, 2).double(), truth, **closeness(torch.float32, kernels))
    serial = layer(x[1] if batched else x[0], bias[1] if batched else None, index[1], scale[1])
    torch.testing.assert_close(serial.double(), truth[1], **closeness(torch.float32, kernels))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_functions_give_the_same_numbers(rng, backend):
    x, weight, bias, index, scale = made(rng, 3, 10, 64, 20)

    def layer(x, bias, index, scale):
        return perturbed_linear(2 * x, weight, bias, index, scale, **NAME, form="apart") + 1

    def layers(*arguments):
        return vmap(layer)(*arguments), perturbed_linear_population(x, weight, *arguments[1:], **NAME, form="fused")

    with torch.no_grad():
        found = torch.compile(layers, fullgraph=True, backend=backend)(x, bias, index, scale)
        for compiled, eager in zip(found, layers(x, bias, index, scale), strict=True):
            assert torch.equal(compiled, eager)


def test_operations_are_what_their_schemas_and_fakes_say(rng):
    x, weight, bias, index, scale = made(rng, 3, 10, 64, 20)
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    names = *NAME.values(), "apart"
    torch.library.opcheck(perturbed_linear_population, (x, weight, bias, index, scale, *names), **checks)
    torch.library.opcheck(perturbed_linear, (x[0, 0], weight, None, index[0], scale[0], *names), **checks)


@every_dtype
@pytest.mark.parametrize("largest", [1.0, 1.9, 0.7, 3e-3])
def test_what_fits_moves_every_weight_and_half_of_it_does_not(dtype, largest):
    weight = torch.tensor([0.3 * largest, -largest, largest / 7]).to(dtype)
    spacing = (torch.nextafter(weight.abs().max(), torch.tensor(9.0, dtype=dtype)) - weight.abs().max()).item()
    for radius in (spacing, 2 * spacing, 16 * spacing):
        assert fits(weight, radius)
        assert form_of(weight, radius) == "fused"
        for sign in (-1, 1):
            assert ((weight.double() + sign * radius).to(dtype) != weight).all()
    assert not fits(weight, spacing / 2)
    assert not fits(weight, 1.5 * spacing)
    assert form_of(weight, spacing / 2) == "apart"


def test_unknown_forms_and_unequal_columns_are_refused(rng):
    x, weight, *others = made(rng, 2, 3, 64, 20)
    with pytest.raises(ValueError, match="`form` must be one of"):
        perturbed_linear_population(x, weight, *others, **NAME, form="both")
    with pytest.raises(ValueError, match="got 63 and 64"):
        perturbed_linear_population(x[..., 1:], weight, *others, **NAME, form="apart")
