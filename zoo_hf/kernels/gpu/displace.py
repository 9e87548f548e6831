"""Triton kernels of `displace_` and `displaced_members`.

A program has as many entries as keep its threads' stores wide and its noise, made once, in registers.

Letters: P members, M entries.
"""

import torch
import triton
import triton.language as tl

from ...noise import Direction, parameter_id
from .devices import on_device_of
from .noise import NAMES, normals, plus_minus, rounded, signed


BLOCKS = {"rademacher": 32, "gaussian": 512}  # Philox blocks of one program
ENTRIES = {"rademacher": 128, "gaussian": 4}  # of a Philox block


def launch(
    out: torch.Tensor, weights: torch.Tensor, direction: Direction, name: str, start: int, scale: float, kind: str
) -> None:
    """Write weights + scale · z to `out`, (M,) each and contiguous."""
    if not out.numel():
        return
    first, skipped = divmod(start, ENTRIES[kind])
    with on_device_of(out):
        displace_kernel[(triton.cdiv(skipped + out.numel(), BLOCKS[kind] * ENTRIES[kind]),)](
            *(out, weights, scale, out.numel(), first, skipped),
            *map(signed, (parameter_id(name), direction.step, direction.seed, direction.index)),
            BLOCKS=BLOCKS[kind],
            GAUSSIAN=kind == "gaussian",
        )


def launch_members(
    out: torch.Tensor, weights: torch.Tensor, index: torch.Tensor, scale: torch.Tensor, name: tuple, kind: str
) -> None:
    """Write weights + scale[m] · z[index[m]] to `out`, (P, M); `name` is seed, step and the parameter's."""
    if not out.numel():
        return
    seed, step, parameter = name
    with on_device_of(out):
        members_kernel[(triton.cdiv(len(weights), BLOCKS[kind] * ENTRIES[kind]), len(out))](
            *(out, weights, index, scale, len(weights)),
            *map(signed, (parameter_id(parameter), step, seed)),
            BLOCKS=BLOCKS[kind],
            GAUSSIAN=kind == "gaussian",
        )


@triton.jit
def displaced(wide, scale, block, parameter, step, seed, index, GAUSSIAN: tl.constexpr):
    """wide + scale · z on the entries of neighbouring blocks."""
    if GAUSSIAN:
        return wide + scale * normals(block, parameter, step, seed, index)
    else:
        return wide + plus_minus(scale, block, parameter, step, seed, index)


@triton.jit(do_not_specialize=["first", *NAMES])  # a `skipped` of 0 is compiled for: aligned loads
def displace_kernel(
    out,
    weights,
    scale,
    numel,
    first,
    skipped,
    parameter,
    step,
    seed,
    index,
    BLOCKS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    """One program writes the entries of BLOCKS neighbouring blocks; `first` is that of the first, less `skipped`."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    size: tl.constexpr = BLOCKS * 4 if GAUSSIAN else BLOCKS * 128
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size) - skipped
    there = (at >= 0) & (at < numel)
    wide = tl.load(weights + at, mask=there).to(tl.float32)
    found = displaced(wide, scale, first + block, parameter, step, seed, index, GAUSSIAN)
    tl.store(out + at, rounded(found, out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=NAMES)
def members_kernel(
    out,
    weights,
    indices,
    scales,
    numel,
    parameter,
    step,
    seed,
    BLOCKS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    """One program writes the entries of BLOCKS neighbouring blocks of one member."""
    block, member = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS), tl.program_id(1).to(tl.int64)
    size: tl.constexpr = BLOCKS * 4 if GAUSSIAN else BLOCKS * 128
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    wide = tl.load(weights + at, mask=at < numel).to(tl.float32)
    index, scale = tl.load(indices + member).to(tl.int32), tl.load(scales + member)
    found = displaced(wide, scale, block, parameter, step, seed, index, GAUSSIAN)
    tl.store(out + member * numel + at, rounded(found, out.dtype.element_ty), mask=at < numel)
