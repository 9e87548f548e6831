"""RWKV-7's recurrence in one call: every backend against the plain twin, and that against the model's own scan."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

from zoo_hf.kernels import rwkv7
from zoo_hf.kernels.choice import VARIABLE
from zoo_hf.kernels.rwkv7 import preferred, rwkv7_scan, suits
from zoo_hf.models.rwkv7 import Steps
from zoo_hf.models.rwkv7 import rwkv7_scan as models_scan

from .conftest import DEVICE, every_backend, every_dtype, needs_triton


CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # all is float32; sums are in another order


def made(rng, *shape, dtype=torch.float32):
    """What the recurrence reads, and a state; shape (…, B, T, N, D)."""

    def normal(*size):
        return torch.randn(*size, generator=rng).to(DEVICE)

    *before, batch, _, heads, size = shape
    key = normal(*shape)
    log_decay, rate = -0.6 * normal(*shape).sigmoid(), normal(*shape).sigmoid()
    steps = normal(*shape), log_decay, key, normal(*shape), F.normalize(key, dim=-1), rate
    return *(each.to(dtype) for each in steps), normal(*before, batch, heads, size, size)


@pytest.fixture
def scanned(run_by):
    """`scanned(kernels, arguments)`: what a backend returns."""
    return lambda kernels, arguments: run_by(kernels, rwkv7_scan, *arguments)


@every_backend
@every_dtype
@pytest.mark.parametrize("shape", [(2, 9, 3, 8), (1, 12, 2, 20), (3, 1, 1, 64), (2, 3, 1, 5)], ids=str)
def test_outputs_and_state_are_those_of_the_models_scan(scanned, rng, kernels, dtype, shape):
    *steps, state = made(rng, *shape, dtype=dtype)
    before = state.clone()
    found = scanned(kernels, (*steps, state))
    expected = models_scan(Steps(*(each.float() for each in steps)), state)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert torch.equal(state, before)


@every_backend
def test_two_halves_are_the_whole(scanned, rng, kernels):
    *steps, state = made(rng, 2, 7, 2, 16)
    outputs, after = scanned(kernels, (*steps, state))
    first, between = scanned(kernels, (*(each[:, :4] for each in steps), state))
    second, last = scanned(kernels, (*(each[:, 4:] for each in steps), between))
    torch.testing.assert_close((torch.cat([first, second], dim=1), last), (outputs, after), **CLOSE)


@every_backend
def test_a_held_token_leaves_the_state_to_the_last_bit(scanned, rng, kernels):
    *steps, state = made(rng, 2, 3, 2, 8)
    held = Steps(*steps).held(torch.zeros(2, 3, dtype=torch.bool, device=DEVICE))
    assert torch.equal(scanned(kernels, (*held, state))[1], state)


@every_backend
@pytest.mark.parametrize("shape", [(2, 0, 2, 8), (0, 3, 2, 8)], ids=str)
def test_nothing_to_read_leaves_the_state(scanned, rng, kernels, shape):
    arguments = made(rng, *shape)
    outputs, after = scanned(kernels, arguments)
    assert outputs.shape == shape
    assert torch.equal(after, arguments[-1])


@every_backend
def test_arguments_may_have_any_strides(scanned, rng, kernels):
    arguments = made(rng, 2, 5, 3, 8)
    strided = [each.transpose(0, -1).contiguous().transpose(0, -1) for each in arguments]
    torch.testing.assert_close(scanned(kernels, strided), scanned(kernels, arguments), **CLOSE)


@every_backend
@pytest.mark.parametrize("columns", [1, 4, 32])
def test_any_number_of_columns_in_a_program_gives_the_same(monkeypatch, scanned, rng, kernels, columns):
    if kernels == "triton":
        from zoo_hf.kernels.gpu import rwkv7

        monkeypatch.setattr(rwkv7, "columns_of", lambda *_: columns)
    arguments = made(rng, 1, 3, 2, 20)
    torch.testing.assert_close(scanned(kernels, arguments), scanned("plain", arguments), **CLOSE)


@every_backend
def test_vmap_gives_each_member_its_own(monkeypatch, rng, kernels):
    monkeypatch.setenv(VARIABLE, kernels)
    *steps, states = made(rng, 3, 2, 4, 2, 8)  # of three members
    steps[3] = steps[3].movedim(0, 2)
    state = states[0]  # that they share
    outputs, after = vmap(rwkv7_scan, in_dims=(0, 0, 0, 2, 0, 0, None))(*steps, state)
    for m in range(3):
        own = (each[m] if place != 3 else each[:, :, m] for place, each in enumerate(steps))
        torch.testing.assert_close((outputs[m], after[m]), rwkv7_scan(*own, state), **CLOSE)


def test_doubles_are_scanned_plainly(scanned, rng):
    arguments = made(rng, 2, 5, 2, 8)
    outputs, after = scanned("plain", [each.double() for each in arguments])
    assert outputs.dtype == after.dtype == torch.float64
    torch.testing.assert_close((outputs.float(), after.float()), scanned("plain", arguments), **CLOSE)


def test_flas_scan_runs_only_where_it_is_asked_for(rng):
    *steps, state = made(rng, 1, rwkv7.CHUNKED, 1, 2, dtype=torch.bfloat16)
    assert preferred(steps, state)[0] == "triton"
    assert preferred(steps, state.double()) == ["plain"]


@needs_triton
def test_it_suits_where_a_kernel_runs_and_nobody_asks_for_gradients(monkeypatch, rng):
    *steps, state = made(rng, 1, 2, 1, 4)
    monkeypatch.setenv(VARIABLE, "triton")
    assert not suits(steps, state)
    with torch.no_grad():
        assert suits(steps, state)
        assert not suits(steps, state.double())
        monkeypatch.setenv(VARIABLE, "plain")
        assert not suits(steps, state)


# fla warns, when it is imported, of all that it lacks, and cannot time the choices of its autotuner without a GPU
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(find_spec("fla") is None, reason="needs flash-linear-attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_of_fla_are_the_same(monkeypatch, scanned, rng, dtype):
    from triton.runtime.autotuner import Autotuner

    prepare = Autotuner.__init__
    first = lambda self, fn, names, configs, *rest, **named: prepare(self, fn, names, configs[:1], *rest, **named)  # noqa: E731
    monkeypatch.setattr(Autotuner, "__init__", first)
    arguments = made(rng, 2, 9, 3, 8, dtype=dtype)
    torch.testing.assert_close(scanned("fla", arguments), scanned("plain", arguments), **CLOSE)
