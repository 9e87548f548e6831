"""Triton kernels of `weighted_sum` and `sgd_`: all directions of a parameter made in registers, in one pass over it.

A program has so many entries that what directions share, reading their names, is done seldom, and so few that their
sums stay in registers.

Letters: m directions, M entries.
"""

import torch
import triton
import triton.language as tl

from ...noise import parameter_id
from ..rule import Rule
from .devices import on_device_of
from .noise import NAMES, normals, plus_minus, rounded, signed
from .philox import in_order, philox


BLOCKS, ENTRIES, WARPS = 64, 128, 4  # Philox blocks of a program, for signs; as many entries of normals
NOT_COMPILED = ("m", NAMES[0])


def tiles(numel: int) -> tuple[int]:
    return (triton.cdiv(numel, BLOCKS * ENTRIES),)


def launch_sum(out: torch.Tensor, names: torch.Tensor, coefficients: torch.Tensor, name: str, kind: str) -> None:
    """Write Σᵢ cᵢ zᵢ to `out`, (M,) float32; names (m, 3) int64."""
    if not out.numel():
        return
    with on_device_of(out):
        sum_kernel[tiles(out.numel())](
            *(out, names, coefficients, out.numel(), len(names), signed(parameter_id(name))),
            BLOCKS=BLOCKS,
            GAUSSIAN=kind == "gaussian",
            num_warps=WARPS,
        )


def launch_sgd(
    weights: torch.Tensor,
    buffer: torch.Tensor | None,
    names: torch.Tensor,
    coefficients: torch.Tensor,
    name: str,
    kind: str,
    rule: Rule,
) -> None:
    """Make the step of a `Rule` in place; see `sgd_`."""
    if not weights.numel():
        return
    with on_device_of(weights):
        sgd_kernel[tiles(weights.numel())](
            *(weights, weights if buffer is None else buffer),
            *(names, coefficients, weights.numel(), len(names), signed(parameter_id(name))),
            *(rule.lr, rule.momentum, rule.dampening, rule.weight_decay, rule.share),
            BUFFER=buffer is not None,
            FIRST=rule.first,
            NESTEROV=rule.nesterov,
            BLOCKS=BLOCKS,
            GAUSSIAN=kind == "gaussian",
            num_warps=WARPS,
        )


@triton.jit
def weighted(names, coefficients, m, parameter, BLOCKS: tl.constexpr, GAUSSIAN: tl.constexpr):
    """Σᵢ cᵢ zᵢ on the entries of this program, (128 BLOCKS) float32: direction after direction."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    total = tl.zeros((BLOCKS * 128,), dtype=tl.float32)
    for i in range(m):
        seed, step = tl.load(names + 3 * i).to(tl.int32), tl.load(names + 3 * i + 1).to(tl.int32)
        index, coefficient = tl.load(names + 3 * i + 2).to(tl.int32), tl.load(coefficients + i)
        if GAUSSIAN:
            first = tl.program_id(0) * (BLOCKS * 32) + tl.arange(0, BLOCKS * 32)
            total += coefficient * normals(first, parameter, step, seed, index)
        else:
            total += plus_minus(coefficient, block, parameter, step, seed, index)
    return total


@triton.jit(do_not_specialize=NOT_COMPILED)
def sum_kernel(out, names, coefficients, numel, m, parameter, BLOCKS: tl.constexpr, GAUSSIAN: tl.constexpr):
    """Σᵢ cᵢ zᵢ on the entries of this program."""
    at = tl.program_id(0).to(tl.int64) * (BLOCKS * 128) + tl.arange(0, BLOCKS * 128)
    tl.store(out + at, weighted(names, coefficients, m, parameter, BLOCKS, GAUSSIAN), mask=at < numel)


@triton.jit(do_not_specialize=NOT_COMPILED)
def sgd_kernel(
    weights,
    buffer,
    names,
    coefficients,
    numel,
    m,
    parameter,
    lr,
    momentum,
    dampening,
    weight_decay,
    share,
    BUFFER: tl.constexpr,
    FIRST: tl.constexpr,
    NESTEROV: tl.constexpr,
    BLOCKS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    """The formula of `sgd_plainly_` on the entries of this program."""
    at = tl.program_id(0).to(tl.int64) * (BLOCKS * 128) + tl.arange(0, BLOCKS * 128)
    there, seed, step = at < numel, tl.load(names).to(tl.int32), tl.load(names + 1).to(tl.int32)
    gradient = weighted(names, coefficients, m, parameter, BLOCKS, GAUSSIAN) / m.to(tl.float32) * share
    wide = tl.load(weights + at, mask=there).to(tl.float32)
    gradient += weight_decay * wide
    if BUFFER:
        moving = gradient
        if not FIRST:
            moving = momentum * tl.load(buffer + at, mask=there).to(tl.float32) + (1 - dampening) * gradient
        store(buffer, at, there, moving, parameter, seed, step, 1, BLOCKS)
        gradient = gradient + momentum * moving if NESTEROV else moving
    store(weights, at, there, wide - lr * gradient, parameter, seed, step, 0, BLOCKS)


@triton.jit
def store(out, at, there, wide, parameter, seed, step, stream, BLOCKS: tl.constexpr):
    """Write float32 numbers, to bfloat16 rounded stochastically as `rounding.round_` does."""
    if out.dtype.element_ty == tl.bfloat16:
        block = tl.program_id(0) * (BLOCKS * 16) + tl.arange(0, BLOCKS * 16)
        w0, w1, w2, w3 = philox(block, 3, parameter, step, seed, tl.cast(stream, tl.int32))
        words = in_order(w0, w1, w2, w3)  # (16 BLOCKS, 4)
        chance = ((words[:, :, None] >> (16 * tl.arange(0, 2)[None, None, :]).to(tl.uint32)) & 0xFFFF).reshape(
            BLOCKS * 128
        )
        bits = wide.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        cut = ((bits + chance) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        tl.store(out + at, tl.where(finite, cut, rounded(wide, tl.bfloat16)), mask=there)
    else:
        tl.store(out + at, wide.to(out.dtype.element_ty), mask=there)
