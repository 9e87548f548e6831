"""The Triton kernel of `perturbed_embedding_population`: signs are made for the rows that are looked up.

A tile is few tokens and as many columns as a Philox block has entries, so that a block is made once for each token.

Letters: P members, T tokens of each, V rows of W, E columns.
"""

import triton
import triton.language as tl
from torch import Tensor

from .devices import on_device_of
from .noise import NAMES, rounded, signed_tile
from .tiles import columns


TOKENS = 16  # of one program


def launch(y: Tensor, ids: Tensor, weight: Tensor, index: Tensor, scale: Tensor, name: tuple[int, int, int]) -> None:
    """Write the rows to y, (P, T, E) and contiguous; name: the parameter's, step and seed, signed."""
    members, tokens, width = y.shape
    if not y.numel():
        return
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    length = 64 if width % 128 else 128
    with on_device_of(y):
        embedding_kernel[(members * triton.cdiv(tokens, TOKENS), triton.cdiv(width, length))](
            *(y, ids, weight, index.contiguous(), scale.contiguous()),
            *(tokens, width, *ids.stride(), weight.stride(0)),
            *name,
            TOKENS=TOKENS,
            COLUMNS=length,
            ALIGNED=width % length == 0,
        )


@triton.jit(do_not_specialize=["tokens", "ids_member", "ids_token", *NAMES[:3]])
def embedding_kernel(
    y,
    ids,
    weight,
    index,
    scale,
    tokens,
    width,
    ids_member,
    ids_token,
    weight_row,
    parameter,
    step,
    seed,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One program looks up COLUMNS columns of TOKENS tokens of a member."""
    member = (tl.program_id(0) // tl.cdiv(tokens, TOKENS)).to(tl.int64)
    token = tl.program_id(0) % tl.cdiv(tokens, TOKENS) * TOKENS + tl.arange(0, TOKENS)
    # what is beyond the last token is looked up as that one is, and not stored
    own = tl.load(ids + member * ids_member + tl.minimum(token, tokens - 1).to(tl.int64) * ids_token).to(tl.int64)
    first = tl.program_id(1) * COLUMNS
    w = columns(weight + own * weight_row, first, width, COLUMNS, ALIGNED).to(tl.float32)  # (TOKENS, COLUMNS)
    number, length = tl.load(index + member).to(tl.int32), tl.load(scale + member)
    z = signed_tile(own * width + first, length, tl.float32, COLUMNS, ALIGNED, parameter, step, seed, number)
    column = first + tl.arange(0, COLUMNS)
    at = (member * tokens + token)[:, None] * width + column[None, :]
    there = (token < tokens)[:, None] & (column < width)[None, :]
    tl.store(y + at, rounded(w + z, y.dtype.element_ty), mask=there)
