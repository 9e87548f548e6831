"""Signs of rows that begin anywhere in a parameter, made in registers: those of the CPU, whatever the tile."""

import pytest
import torch

from zoo_hf.noise import Direction, entries, parameter_id

from .conftest import DEVICE, LARGE, every_dtype


triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from zoo_hf.kernels.gpu.noise import row_signs, signed, signed_tile  # noqa: E402


@triton.jit
def tile_kernel(
    out, bits, start, parameter, step, seed, index, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr
):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at, first, dtype = row[:, None] * COLUMNS + column[None, :], tl.load(start + row), out.dtype.element_ty
    tl.store(out + at, signed_tile(first, 0.5, dtype, COLUMNS, ALIGNED, parameter, step, seed, index))
    tl.store(bits + at, row_signs(first, COLUMNS, ALIGNED, parameter, step, seed, index))


@every_dtype
@pytest.mark.parametrize("columns", [16, 32, 64, 128])
@pytest.mark.parametrize("apart", ["a multiple of the columns", 1, 33, 97])
def test_tiles_hold_the_signs_of_the_cpu(dtype, columns, apart):
    aligned = isinstance(apart, str)
    start = torch.arange(16, device=DEVICE) * (columns if aligned else apart) + 2**33
    out = torch.empty(16, columns, dtype=dtype, device=DEVICE)
    bits = torch.empty_like(out, dtype=torch.int32)
    numbers = map(signed, (parameter_id("w"), 7, LARGE, 2**31 + 3))
    tile_kernel[(1,)](out, bits, start, *numbers, ROWS=16, COLUMNS=columns, ALIGNED=aligned)
    z = torch.stack([entries(Direction(LARGE, 7, 2**31 + 3), "w", s, s + columns) for s in start.tolist()])
    assert torch.equal(out.float().cpu(), 0.5 * z)
    assert torch.equal(2.0 * bits.cpu() - 1, z)
