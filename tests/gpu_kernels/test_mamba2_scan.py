"""Mamba-2's recurrence in one call: the Triton kernel and its plain twin against the model's own scan."""

import pytest
import torch
from torch.func import vmap

from zoo_hf.kernels.choice import VARIABLE
from zoo_hf.kernels.mamba2 import mamba2_scan, suits
from zoo_hf.models.mamba2 import SSDInputs, ssd_scan

from .conftest import DEVICE, every_backend, every_dtype, needs_triton


CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # all is float32; sums are in another order


def made(rng, *shape, dtype=torch.float32):
    """What the recurrence reads, its rates, and a state; shape (…, B, T, G, R, P, N)."""

    def normal(*size):
        return torch.randn(*size, generator=rng).to(DEVICE)

    *before, batch, tokens, groups, heads, values, size = shape
    of_tokens = *before, batch, tokens, groups
    x, b, c = normal(*of_tokens, heads, values), normal(*of_tokens, size), normal(*of_tokens, size)
    step, rates = normal(*of_tokens, heads).abs(), -normal(*before, groups, heads).abs()
    state = normal(*before, batch, groups, size, heads, values)
    return x.to(dtype), step, b.to(dtype), c.to(dtype), rates, state


@pytest.fixture
def scanned(run_by):
    """`scanned(kernels, arguments)`: what a backend returns."""
    return lambda kernels, arguments: run_by(kernels, mamba2_scan, *arguments)


@every_backend
@every_dtype
@pytest.mark.parametrize("shape", [(2, 9, 2, 3, 8, 5), (1, 6, 1, 2, 40, 16), (3, 1, 2, 2, 7, 9)], ids=str)
def test_outputs_and_state_are_those_of_the_models_scan(scanned, rng, kernels, dtype, shape):
    *inputs, rates, state = made(rng, *shape, dtype=dtype)
    before = state.clone()
    found = scanned(kernels, (*inputs, rates, state))
    torch.testing.assert_close(found, ssd_scan(SSDInputs(*inputs), rates, state), **CLOSE)
    assert torch.equal(state, before)


@every_backend
@every_dtype
@pytest.mark.parametrize("shape", [(1, 33, 2, 2, 8, 5), (2, 64, 1, 1, 20, 16), (1, 100, 1, 2, 70, 3)], ids=str)
def test_many_tokens_go_in_blocks_with_the_same_results(scanned, rng, kernels, dtype, shape):
    x, step, *others, rates, state = made(rng, *shape, dtype=dtype)
    step[:, 40:50] *= 30  # a state that is all but forgotten, and none that overflows
    expected = ssd_scan(SSDInputs(x, step, *others), rates, state)
    # products of float32 take all its digits, those of narrower types on a GPU as many as theirs
    rough = DEVICE == "cuda" and dtype != torch.float32
    close = {"rtol": 2e-3, "atol": 2e-3 * expected[0].abs().max().item()} if rough else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(scanned(kernels, (x, step, *others, rates, state)), expected, **close)


@every_backend
def test_a_block_whose_steps_are_zero_leaves_the_state_to_the_last_bit(scanned, rng, kernels):
    x, step, *others, state = made(rng, 1, 40, 1, 2, 8, 6)
    assert torch.equal(scanned(kernels, (x, torch.zeros_like(step), *others, state))[1], state)


@every_backend
def test_two_halves_are_the_whole(scanned, rng, kernels):
    *inputs, rates, state = made(rng, 2, 7, 2, 2, 8, 6)
    outputs, after = scanned(kernels, (*inputs, rates, state))
    first, between = scanned(kernels, (*(each[:, :4] for each in inputs), rates, state))
    second, last = scanned(kernels, (*(each[:, 4:] for each in inputs), rates, between))
    torch.testing.assert_close((torch.cat([first, second], dim=1), last), (outputs, after), **CLOSE)


@every_backend
def test_a_step_of_zero_leaves_the_state_to_the_last_bit(scanned, rng, kernels):
    x, step, *others, state = made(rng, 2, 3, 2, 2, 8, 6)
    assert torch.equal(scanned(kernels, (x, torch.zeros_like(step), *others, state))[1], state)


@every_backend
@pytest.mark.parametrize("shape", [(2, 0, 2, 3, 8, 5), (0, 3, 2, 3, 8, 5)], ids=str)
def test_nothing_to_read_leaves_the_state(scanned, rng, kernels, shape):
    arguments = made(rng, *shape)
    outputs, after = scanned(kernels, arguments)
    assert outputs.shape == shape[:-1]
    assert torch.equal(after, arguments[-1])


@every_backend
def test_arguments_may_have_any_strides(scanned, rng, kernels):
    arguments = made(rng, 2, 5, 2, 3, 8, 5)
    strided = [each.transpose(0, -1).contiguous().transpose(0, -1) for each in arguments]
    torch.testing.assert_close(scanned(kernels, strided), scanned(kernels, arguments), **CLOSE)


@every_backend
@pytest.mark.parametrize("columns", [1, 4, 32])
def test_any_number_of_columns_in_a_program_gives_the_same(monkeypatch, scanned, rng, kernels, columns):
    if kernels == "triton":
        from zoo_hf.kernels.gpu import mamba2

        monkeypatch.setattr(mamba2, "columns_of", lambda *_: columns)
    arguments = made(rng, 1, 3, 1, 2, 20, 5)
    torch.testing.assert_close(scanned(kernels, arguments), scanned("plain", arguments), **CLOSE)


@every_backend
@pytest.mark.parametrize("own_rates", [False, True], ids=["shared rates", "own rates"])
def test_vmap_gives_each_member_its_own(monkeypatch, rng, kernels, own_rates):
    monkeypatch.setenv(VARIABLE, kernels)
    x, step, b, c, rates, states = made(rng, 3, 2, 4, 2, 2, 8, 5)  # of three members
    state = states[0]  # that they share
    rates = rates if own_rates else rates[0]
    in_dims = 1, 0, 0, 0, 0 if own_rates else None, None
    outputs, after = vmap(mamba2_scan, in_dims=in_dims)(x.movedim(0, 1), step, b, c, rates, state)
    for m in range(3):
        alone = mamba2_scan(x[m], step[m], b[m], c[m], rates[m] if own_rates else rates, state)
        torch.testing.assert_close((outputs[m], after[m]), alone, **CLOSE)


def test_doubles_are_scanned_plainly(scanned, rng):
    arguments = made(rng, 2, 5, 2, 3, 8, 5)
    outputs, after = scanned("plain", [each.double() for each in arguments])
    assert outputs.dtype == after.dtype == torch.float64
    torch.testing.assert_close((outputs.float(), after.float()), scanned("plain", arguments), **CLOSE)


@needs_triton
def test_it_suits_where_a_kernel_runs_and_nobody_asks_for_gradients(monkeypatch, rng):
    *inputs, rates, state = made(rng, 1, 2, 1, 1, 4, 4)
    monkeypatch.setenv(VARIABLE, "triton")
    assert not suits(inputs, rates, state)
    with torch.no_grad():
        assert suits(inputs, rates, state)
        assert not suits(inputs, rates, state.double())
        monkeypatch.setenv(VARIABLE, "plain")
        assert not suits(inputs, rates, state)
