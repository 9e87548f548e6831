"""Linear layers of members W + A Bᵀ: the kernel, interpreted where there is no GPU, and its plain twin."""

import pytest
import torch
from torch.func import vmap

from zoo_hf.displaced import multiplied
from zoo_hf.kernels.choice import VARIABLE
from zoo_hf.kernels.low_rank_linear import low_rank_linear, low_rank_linear_population

from .conftest import CLOSE, DEVICE, every_backend, every_dtype


def made(rng, members, rows, inputs, outputs, rank, dtype=torch.float32):
    """x, W, b, A and B; x Wᵀ and (x B) Aᵀ are of size 1."""

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=rng)).to(DEVICE, dtype)

    size = max(1, inputs) ** -0.5
    x, weight, bias = normal(members, rows, inputs), normal(outputs, inputs, scale=size), normal(members, outputs)
    return [x, weight, bias, normal(members, outputs, rank, scale=size), normal(members, inputs, rank)]


def expected(x, weight, bias, left, right):
    """The outputs in float64."""
    x, left, right = x.double(), left.double(), right.double()
    y = x @ (weight.double() + left @ right.mT).mT
    return y if bias is None else y + bias.double()[:, None]


def closeness(dtype, kernels, rank):
    """x B is rounded, and so is the sum; the twin rounds after every product and every sum."""
    if dtype is torch.float32:
        return {"rtol": 1e-6, "atol": 1e-5}
    eps = torch.finfo(dtype).eps
    return {"rtol": eps / 2, "atol": 4 * (rank + 4) * eps / 2 if kernels == "plain" else 4 * rank**0.5 * eps / 2}


@every_backend
@every_dtype
@pytest.mark.parametrize(
    ("members", "rows", "inputs", "outputs", "rank"),
    [(3, 5, 256, 130, 1), (2, 70, 192, 33, 4), (1, 20, 101, 20, 16), (2, 130, 75, 260, 2), (2, 3, 40, 7, 17)],
)
def test_outputs_are_those_of_the_members_matrices(run_by, rng, kernels, dtype, members, rows, inputs, outputs, rank):
    arguments = made(rng, members, rows, inputs, outputs, rank, dtype)
    y = run_by(kernels, low_rank_linear_population, *arguments)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected(*arguments), **closeness(dtype, kernels, rank))


@every_backend
@pytest.mark.parametrize("rows", [4, 66])
def test_strides_do_not_matter(run_by, rng, kernels, rows):
    x, weight, bias, left, right = made(rng, 2, rows, 64, 20, 3)
    strange = (
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        weight.mT.contiguous().mT,
        bias[0].expand(2, 20),
        left.mT.contiguous().mT,
        right[:1].expand(2, 64, 3),
    )
    y = run_by(kernels, low_rank_linear_population, *strange)
    torch.testing.assert_close(y.double(), expected(*strange), **closeness(torch.float32, kernels, 3))


@every_backend
@pytest.mark.parametrize("rows", [4, 66])
def test_wide_factors_keep_their_precision(run_by, rng, kernels, rows):
    x, weight, bias, left, right = (torch.zeros_like(each) for each in made(rng, 2, rows, 64, 20, 1, torch.bfloat16))
    x[..., 0], right[:, 0], bias[:] = 3, 1, -3
    left = left.float() + 1 + 2.0**-10  # in bfloat16 it would be 1
    y = run_by(kernels, low_rank_linear_population, x, weight.float(), bias, left, right.float())
    assert torch.equal(y, torch.full_like(y, 3 * 2.0**-10))


@every_backend
@pytest.mark.parametrize("shape", [(0, 5, 64, 20), (2, 0, 64, 20), (2, 5, 64, 0), (2, 5, 0, 20)], ids=str)
def test_nothing_gives_nothing_and_no_inputs_give_the_bias(run_by, rng, kernels, shape):
    arguments = made(rng, *shape, 2)
    y = run_by(kernels, low_rank_linear_population, *arguments)
    assert y.shape == (*shape[:2], shape[3])
    assert torch.equal(y, arguments[2][:, None].expand_as(y))


@every_backend
def test_under_vmap_a_member_is_what_a_displaced_matrix_gives(monkeypatch, rng, kernels):
    monkeypatch.setenv(VARIABLE, kernels)
    x, weight, bias, left, right = made(rng, 3, 10, 64, 20, 2)
    inner = x.unflatten(1, (2, 5)).movedim(0, 2)  # (2, 5, P, I)

    def layer(of):
        return lambda x, bias, left, right: of(x, weight, bias, left, right)

    y = vmap(layer(low_rank_linear), in_dims=(2, 0, 0, 0), out_dims=1)(inner, bias, left, right)
    truth = vmap(layer(multiplied), in_dims=(2, 0, 0, 0), out_dims=1)(inner, bias, left, right)
    torch.testing.assert_close(y, truth, **CLOSE)
    torch.testing.assert_close(
        low_rank_linear(inner[:, :, 1], weight, bias[1], left[1], right[1]), truth[:, 1], **CLOSE
    )
    shared = vmap(layer(low_rank_linear), in_dims=(None, None, 0, None))(x[0], None, left, right[0])
    own = [x[0], weight, None, left, right[:1].expand_as(right)]
    torch.testing.assert_close(shared.double(), expected(*own), **CLOSE)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_functions_give_the_same_numbers(rng, backend):
    x, weight, bias, left, right = made(rng, 3, 10, 64, 20, 2)

    def layers(x, bias, left, right):
        one = vmap(lambda *own: low_rank_linear(2 * own[0], weight, *own[1:]) + 1)
        return one(x, bias, left, right), low_rank_linear_population(x, weight, None, left, right)

    with torch.no_grad():
        found = torch.compile(layers, fullgraph=True, backend=backend)(x, bias, left, right)
        for compiled, eager in zip(found, layers(x, bias, left, right), strict=True):
            assert torch.equal(compiled, eager)


def test_operations_are_what_their_schemas_and_fakes_say(rng):
    x, weight, bias, left, right = made(rng, 3, 10, 64, 20, 2)
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(low_rank_linear_population, (x, weight, bias, left, right), **checks)
    torch.library.opcheck(low_rank_linear, (x[0, 0], weight, None, left[0], right[0]), **checks)


def test_unequal_inputs_are_refused(rng):
    x, *others = made(rng, 2, 3, 64, 20, 1)
    with pytest.raises(ValueError, match=r"got \(63, 64, 64\)"):
        low_rank_linear_population(x[..., 1:], *others)
