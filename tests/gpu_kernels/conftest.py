"""What the kernels' tests share: a device, the backends, and calls whose memory is NaN until something is written."""

from importlib.util import find_spec

import pytest
import torch

from zoo_hf.kernels.choice import VARIABLE


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGE = 2**32 - 1  # the last of the integers that name a direction
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
CLOSE = {"rtol": 1e-6, "atol": 5e-6}  # float32 sums of size 1, in another order
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
every_backend = pytest.mark.parametrize("kernels", ["plain", pytest.param("triton", marks=needs_triton)])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def unwritten(*shape, empty=torch.empty, **kind):
    """Memory that nobody has written yet: NaN, where it can be."""
    memory = empty(*shape, **kind)
    return memory.fill_(torch.nan) if memory.is_floating_point() else memory


@pytest.fixture
def run_by(monkeypatch):
    """`run_by(kernels, call, *arguments)`: what a call returns by a backend, NaN where its kernel wrote nothing."""

    def run(kernels, call, *arguments, **keywords):
        with monkeypatch.context() as patched:
            patched.setenv(VARIABLE, kernels)
            patched.setattr(torch, "empty", unwritten)
            return call(*arguments, **keywords)

    return run


@pytest.fixture
def both(run_by):
    """`both(call, *arguments)`: what a call returns with Triton's kernels, then with the plain twins."""

    def run(call, *arguments, **keywords):
        return tuple(run_by(kernels, call, *arguments, **keywords) for kernels in ("triton", "plain"))

    return run
