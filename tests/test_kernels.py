"""Fast paths against their plain twins."""

import shutil

import pytest
import torch

from zoo_hf.kernels import use_compiler
from zoo_hf.kernels.compiled_signs import COMPILED_BLOCKS, CompiledRademacher
from zoo_hf.noise import DISTRIBUTIONS, Direction, Rademacher, entries


# torch 2.13's own inductor still imports a module that uses it
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"),
]

DIRECTIONS = [Direction(seed=2**32 - 1, step=2**32 - 1, index=2**32 - 1), Direction(seed=3, step=0, index=1)]


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (5, COMPILED_BLOCKS + 9), (COMPILED_BLOCKS, 2 * COMPILED_BLOCKS)])
def test_compiled_signs_are_the_same_bits(start, stop):
    arguments = DIRECTIONS, "head.weight", start, stop, torch.device("cpu")
    assert torch.equal(CompiledRademacher().pack(*arguments), Rademacher().pack(*arguments))


def test_the_compiler_serves_entries_while_it_is_on():
    plain = entries(DIRECTIONS[0], "w", 100, 5000)
    use_compiler()
    try:
        assert isinstance(DISTRIBUTIONS["rademacher"], CompiledRademacher)
        assert torch.equal(entries(DIRECTIONS[0], "w", 100, 5000), plain)
    finally:
        use_compiler(False)
    assert not isinstance(DISTRIBUTIONS["rademacher"], CompiledRademacher)
