"""Losses without logits: the Triton kernel, in Triton's interpreter where there is no GPU, against the plain twin."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

from zoo_hf.kernels import head_loss
from zoo_hf.kernels.choice import VARIABLE
from zoo_hf.kernels.head_loss import head_loss_population, suits, token_losses
from zoo_hf.models.loss import summed_loss
from zoo_hf.noise import Direction, entries

from .conftest import CLOSE, DEVICE, every_backend, every_dtype, needs_triton


pytestmark = needs_triton

NAME = {"seed": 2**32 - 1, "step": 7, "name": "head.weight"}


def made(rng, members=2, rows=5, vocabulary=37, width=32, *, dtype=torch.float32, noisy=True):
    """Arguments of `head_loss_population`, logits of size 1; the second row does not count."""

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=rng)).to(DEVICE, dtype)

    targets = torch.randint(vocabulary, (rows,), generator=rng).to(DEVICE)
    targets[1] = -100
    return {
        "hidden": normal(members, rows, width),
        "weight": normal(vocabulary, width, scale=width**-0.5),
        "bias": normal(vocabulary),
        "targets": targets,
        "index": torch.arange(members, device=DEVICE) + 2**31 if noisy else None,
        "scale": torch.linspace(-0.5, 0.25, members, device=DEVICE) if noisy else None,
        **NAME,
    }


@every_dtype
@pytest.mark.parametrize(
    ("rows", "vocabulary", "width"),
    [(5, 37, 32), (70, 150, 96), (3, 130, 128), (130, 20, 64), (260, 33, 64), (3, 20, 7), (4, 33, 41), (2, 70, 144)],
)
@pytest.mark.parametrize("noisy", [False, True], ids=["shared", "signs"])
def test_losses_are_those_of_the_logits(both, rng, dtype, rows, vocabulary, width, noisy):
    arguments = made(rng, 2, rows, vocabulary, width, dtype=dtype, noisy=noisy)
    triton, plain = both(head_loss_population, **arguments)
    assert triton.dtype == plain.dtype == torch.float32
    torch.testing.assert_close(triton, plain, **CLOSE)
    assert (triton[:, 1] == 0).all()


@pytest.mark.parametrize("programs", [1, 10**6])
def test_any_number_of_parts_of_the_vocabulary_gives_the_same_losses(monkeypatch, both, rng, programs):
    from zoo_hf.kernels.gpu import head_loss

    monkeypatch.setattr(head_loss, "PROGRAMS", programs)
    triton, plain = both(head_loss_population, **made(rng, vocabulary=500))
    torch.testing.assert_close(triton, plain, **CLOSE)


def test_members_may_have_their_own_weights_biases_and_targets(both, rng):
    arguments = made(rng, noisy=False)
    arguments["weight"] = torch.randn(2, 37, 32, generator=rng).to(DEVICE)
    arguments["bias"] = torch.randn(2, 37, generator=rng).to(DEVICE)
    arguments["targets"] = torch.randint(37, (2, 5), generator=rng).to(DEVICE)
    triton, plain = both(head_loss_population, **arguments)
    torch.testing.assert_close(triton, plain, **CLOSE)
    own = [F.cross_entropy(arguments["hidden"][m] @ arguments["weight"][m].T + arguments["bias"][m],
                           arguments["targets"][m], reduction="none") for m in range(2)]  # fmt: skip
    torch.testing.assert_close(plain, torch.stack(own), **CLOSE)


def test_arguments_may_have_any_strides(both, rng):
    arguments = made(rng)
    strided = dict(arguments)
    strided["hidden"] = arguments["hidden"].transpose(0, 2).contiguous().transpose(0, 2)
    strided["weight"] = arguments["weight"].T.contiguous().T
    strided["targets"] = torch.stack([arguments["targets"]] * 3, dim=1)[:, 1].expand(2, -1)
    triton, _ = both(head_loss_population, **strided)
    torch.testing.assert_close(triton, both(head_loss_population, **arguments)[0], rtol=0, atol=0)
    strided["hidden"] = arguments["hidden"].transpose(0, 1).contiguous().transpose(0, 1)
    strided["weight"] = torch.cat([arguments["weight"]] * 2, dim=1)[:, :32]
    torch.testing.assert_close(both(head_loss_population, **strided)[0], triton, rtol=0, atol=0)


def test_a_member_is_displaced_by_the_entries_of_its_direction(both, rng):
    arguments = made(rng) | {"bias": None}
    triton, _ = both(head_loss_population, **arguments)
    for member, (index, scale) in enumerate(zip(arguments["index"], arguments["scale"], strict=True)):
        z = entries(Direction(NAME["seed"], NAME["step"], int(index)), NAME["name"], 0, 37 * 32, device=DEVICE)
        logits = arguments["hidden"][member] @ (arguments["weight"] + scale * z.view(37, 32)).T
        expected = F.cross_entropy(logits, arguments["targets"], reduction="none")
        torch.testing.assert_close(triton[member], expected, **CLOSE)


def test_a_displacement_below_the_spacing_of_bfloat16_is_felt(both, rng):
    arguments = made(rng, dtype=torch.bfloat16) | {"scale": torch.tensor([1e-4, -1e-4], device=DEVICE)}
    arguments["hidden"] = arguments["hidden"][:1].expand(2, -1, -1)
    arguments["index"] = arguments["index"][:1].expand(2)
    triton, _ = both(head_loss_population, **arguments)
    slopes = (triton[0] - triton[1]) / 2e-4
    wide = {name: part.double() if name in ("hidden", "weight", "bias") else part for name, part in arguments.items()}
    exact = head_loss_population(**wide)
    # a float32 loss near 5 moves in steps of 5e-7, which is 2e-3 of a slope
    torch.testing.assert_close(slopes.double(), (exact[0] - exact[1]) / 2e-4, rtol=0, atol=2e-2)
    assert slopes.abs().max() > 1


def test_a_target_outside_the_vocabulary_is_nan(monkeypatch, rng):
    arguments = made(rng)
    monkeypatch.setenv(VARIABLE, "triton")
    arguments["targets"][0], arguments["targets"][2] = 37, -1
    losses = head_loss_population(**arguments)
    assert losses.isnan().tolist() == [[True, False, True, False, False]] * 2


# of Triton's interpreter, which is numpy: log 0 = −∞ is what is meant for a part without probability
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning")
def test_tokens_of_probability_zero_do_not_count(both, rng):
    arguments = made(rng, vocabulary=200)
    arguments["bias"][:150] = -torch.inf
    arguments["targets"] = arguments["targets"].clamp(min=150)
    triton, plain = both(head_loss_population, **arguments)
    torch.testing.assert_close(triton, plain, **CLOSE)
    assert triton.isfinite().all()


def test_a_member_that_is_nan_has_a_loss_that_is_nan(both, rng):
    arguments = made(rng)
    arguments["hidden"][1, 3, 4] = torch.nan
    triton, _ = both(head_loss_population, **arguments)
    assert triton.isnan().nonzero().tolist() == [[1, 3]]


def test_the_plain_losses_have_the_bits_of_the_unfused_ones(monkeypatch, rng):
    monkeypatch.setenv(VARIABLE, "plain")
    hidden, weight, bias, targets = (made(rng)[name] for name in ("hidden", "weight", "bias", "targets"))
    batch = hidden.view(2, 5, 32), targets.expand(2, 5)
    found = token_losses(batch[0], weight, bias, batch[1]).sum(dtype=torch.float64)
    assert torch.equal(found, summed_loss(F.linear(batch[0], weight, bias), batch[1]))


def test_chunks_of_rows_do_not_change_the_plain_losses(monkeypatch, rng):
    monkeypatch.setenv(VARIABLE, "plain")
    whole = head_loss_population(**made(rng))
    for logits in (1, 100):
        monkeypatch.setattr(head_loss, "LOGITS", logits)
        again = head_loss_population(**made(torch.Generator().manual_seed(0)))
        torch.testing.assert_close(again, whole, **CLOSE)


def test_doubles_stay_doubles(monkeypatch, rng):
    monkeypatch.setenv(VARIABLE, "triton")
    arguments = made(rng, dtype=torch.float64)
    losses, narrow = head_loss_population(**arguments), made(torch.Generator().manual_seed(0))
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses.float(), head_loss_population(**narrow), **CLOSE)


@every_backend
@pytest.mark.parametrize("own", [(), ("index", "scale"), ("weight",), ("bias", "targets")], ids=" ".join)
def test_vmap_gives_each_member_its_losses(monkeypatch, rng, kernels, own):
    monkeypatch.setenv(VARIABLE, kernels)
    arguments = {name: part for name, part in made(rng, members=3).items() if name not in NAME}
    if "index" not in own:
        arguments |= {"index": arguments["index"][0], "scale": arguments["scale"][0]}
    for name in {*own} - {"index", "scale"}:
        arguments[name] = torch.stack([arguments[name].roll(n, 0) for n in range(3)])
    dims = {name: 0 if name in ("hidden", *own) else None for name in arguments}

    def member(given):
        rest = {name: given[name] for name in ("index", "scale")}
        return token_losses(given["hidden"], given["weight"], given["bias"], given["targets"], **rest, **NAME)

    found = vmap(member, in_dims=(dims,))(arguments)
    for m in range(3):
        alone = member({name: part if dims[name] is None else part[m] for name, part in arguments.items()})
        torch.testing.assert_close(found[m], alone, **CLOSE)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
@every_backend
def test_no_rows_have_no_losses(monkeypatch, rng, shape, kernels):
    monkeypatch.setenv(VARIABLE, kernels)
    members, rows = shape
    arguments = made(rng)
    arguments |= {"hidden": arguments["hidden"][:members, :rows], "targets": arguments["targets"][:rows]}
    assert head_loss_population(**arguments).shape == shape


def test_products_are_in_the_precision_of_autocast(monkeypatch, rng):
    monkeypatch.setenv(VARIABLE, "triton")
    hidden, weight, bias, targets = (made(rng)[name] for name in ("hidden", "weight", "bias", "targets"))
    with torch.autocast(DEVICE, torch.bfloat16):
        found = token_losses(hidden[0], weight, bias, targets)
    torch.testing.assert_close(found, token_losses(hidden[0].bfloat16(), weight.bfloat16(), bias, targets))


def test_a_stand_in_for_a_weight_may_override_the_losses(rng):
    class Displaced(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            assert func is token_losses
            with torch._C.DisableTorchFunctionSubclass():
                return func(args[0], args[1].as_subclass(torch.Tensor) + 1, *args[2:], **kwargs)

    hidden, weight, bias, targets = (made(rng)[name] for name in ("hidden", "weight", "bias", "targets"))
    found = token_losses(hidden[0], weight.as_subclass(Displaced), bias, targets)
    assert torch.equal(found, token_losses(hidden[0], weight + 1, bias, targets))


def test_it_suits_where_its_kernel_runs_and_nobody_asks_for_gradients(monkeypatch, rng):
    arguments = made(rng)
    hidden, weight = arguments["hidden"], arguments["weight"]
    monkeypatch.setenv(VARIABLE, "triton")
    assert not suits(hidden, weight)
    with torch.no_grad():
        assert suits(hidden, weight)
        assert not suits(hidden.double(), weight.double())
        monkeypatch.setenv(VARIABLE, "plain")
        assert not suits(hidden, weight)
