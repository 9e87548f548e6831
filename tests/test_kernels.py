"""Fast paths against their plain twins."""

import shutil
from contextlib import contextmanager

import pytest
import torch
from conftest import texts, tiny_lstm, weights

from zoo_hf.kernels import use_compiler
from zoo_hf.kernels.compiled_signs import COMPILED_BLOCKS, CompiledRademacher
from zoo_hf.noise import DISTRIBUTIONS, Blocks, Direction, Rademacher, entries


# torch 2.13's own inductor still imports a module that uses it
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"),
]

DIRECTIONS = [Direction(seed=2**32 - 1, step=2**32 - 1, index=2**32 - 1), Direction(seed=3, step=0, index=1)]


@contextmanager
def compiler():
    use_compiler()
    try:
        yield
    finally:
        use_compiler(False)


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (5, COMPILED_BLOCKS + 9), (COMPILED_BLOCKS, 2 * COMPILED_BLOCKS)])
def test_compiled_signs_are_the_same_bits(start, stop):
    parts = [Blocks("head.weight", start, stop), Blocks("w", 7, 9, purpose=1)]
    arguments = DIRECTIONS, parts, torch.device("cpu")
    assert torch.equal(CompiledRademacher().pack(*arguments), Rademacher().pack(*arguments))


def test_the_compiler_serves_entries_while_it_is_on():
    plain = entries(DIRECTIONS[0], "w", 100, 5000)
    with compiler():
        assert isinstance(DISTRIBUTIONS["rademacher"], CompiledRademacher)
        assert torch.equal(entries(DIRECTIONS[0], "w", 100, 5000), plain)
    assert not isinstance(DISTRIBUTIONS["rademacher"], CompiledRademacher)


def test_a_run_with_compiled_signs_ends_with_the_same_bits(trainer, monkeypatch):
    pack, calls = CompiledRademacher.pack, []
    monkeypatch.setattr(CompiledRademacher, "pack", lambda *arguments: calls.append(arguments) or pack(*arguments))
    plain, compiled = tiny_lstm(), tiny_lstm()
    trainer(plain, texts(8), max_steps=3).train()
    with compiler():
        trainer(compiled, texts(8), max_steps=3).train()
    assert calls
    trained = weights(plain)
    assert not torch.equal(trained["lm_head.weight"], tiny_lstm().lm_head.weight)
    for name, weight in weights(compiled).items():
        assert torch.equal(weight, trained[name]), name


def test_a_run_of_a_model_compiled_by_inductor_ends_with_the_same_weights(trainer):
    plain, compiled = tiny_lstm(), tiny_lstm()
    start = weights(plain)
    trainer(plain, texts(8)).train()
    trainer(compiled, texts(8), torch_compile=True, torch_compile_backend="inductor").train()
    trained = weights(plain)
    for name, weight in weights(compiled).items():
        moved = (trained[name] - start[name]).abs().max().item()
        # a coefficient errs by what rounds the losses, 1e-7, divided by the smoothing radius, 1e-2
        torch.testing.assert_close(weight, trained[name], atol=1e-3 * moved, rtol=0)
