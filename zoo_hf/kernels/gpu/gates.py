"""The alternating form of the recurrent scans, for heads too large for the chip.

A token is one product for all heads of some members, and one kernel that makes new states of the gates. Both write
where they wrote before, so that a chunk of small tokens is recorded once in a CUDA graph and replayed: launching them
one by one takes longer than computing them.

Letters: P members, T tokens of each of B sequences, N heads of D units, G gates, S slots of the state.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...noise import spans
from ..scan import SLOTS, Task
from .cells import load_gates, load_slots, new_state, store_slots
from .devices import on_device_of
from .noise import rounded
from .scan import mask_strides


CHUNK = 32  # tokens of a recording at most
FEWEST = 8  # tokens that are worth one
RECORDED_BYTES = 1 << 26  # of a recording's inputs at most: tokens with more take longer than their launches
RECORDINGS = 4  # that are kept, each with room for its inputs and a group's matrices
ROWS, UNITS = 8, 128  # of a program of the gates' kernel


class Shape(NamedTuple):
    """Of a scan of some members: P, N, B, G and D, the dtype of its products, whether it has a mask, and its chunk."""

    cell: str
    members: int
    heads: int
    batch: int
    gates: int
    size: int
    dtype: torch.dtype
    masked: bool
    chunk: int


class Room(NamedTuple):
    """What a scan writes, in place.

    Args:
        matrices: R, (P·N, G·D, D).
        product: R h, (P·N, B, G·D).
        h: as the product reads it, (P·N, B, D).
        slots: (S, P·N, B, D), float32.
        bias: of the GRU's candidates, (P·N, D).
    """

    matrices: Tensor
    product: Tensor
    h: Tensor
    slots: Tensor
    bias: Tensor

    @classmethod
    def of(cls, shape: Shape, device: torch.device) -> "Room":
        heads, width = shape.members * shape.heads, shape.gates * shape.size
        like = torch.empty(0, dtype=shape.dtype, device=device)
        return cls(
            like.new_empty(heads, width, shape.size),
            like.new_empty(heads, shape.batch, width),
            like.new_empty(heads, shape.batch, shape.size),
            like.new_empty(SLOTS[shape.cell], heads, shape.batch, shape.size, dtype=torch.float32),
            like.new_empty(heads, shape.size),
        )

    def start_(self, task: Task) -> None:
        """Take a scan's matrices and its state before the first token."""
        members, _, heads, _, gates, size = task.pre.shape
        matrices = self.matrices.view(members, heads, gates, size, size)
        matrices.copy_(task.recurrent.transpose(1, 2))
        state = task.state.transpose(0, 1).flatten(1, 2)  # (S, P·N, B, D)
        self.slots.copy_(state)
        self.h.copy_(state[0])
        if task.cell == "slstm":
            self.slots[3].masked_fill_(self.slots[2] == 0, -torch.inf)
        if task.candidate_bias is not None:
            self.bias.copy_(task.candidate_bias.flatten(0, 1))


def scan_(outputs: Tensor, final: Tensor, task: Task) -> None:
    """Write outputs (P, T, N, B, D) and the final state; no displacement of the task's matrices is left to make."""
    cell, pre, *_, real, _ = task
    members, tokens, heads, batch, gates, size = pre.shape
    chunk = recorded_tokens(tokens, pre[:, :1].nbytes) if recordable(pre.device) else 0
    shape = Shape(cell, members, heads, batch, gates, size, pre.dtype, real is not None, chunk)
    if chunk:
        recording = recording_of(shape, pre.device)
        room, advance_ = recording.room, recording.advance_
    else:
        room = Room.of(shape, pre.device)
        advance_ = functools.partial(advance_plainly_, room, cell)
    room.start_(task)
    for first, last in spans(tokens, chunk or CHUNK):
        advance_(outputs[:, first:last], pre[:, first:last], None if real is None else real[..., first:last])
    slots = room.slots
    if cell == "slstm":
        slots[3].masked_fill_(slots[2] == 0, 0)  # rows that saw no token yet: a state is finite
    final.copy_(slots.unflatten(1, (members, heads)).transpose(0, 1))


def advance_plainly_(room: Room, cell: str, outputs: Tensor, pre: Tensor, real: Tensor | None) -> None:
    """The tokens of `pre`, (P, ·, N, B, G, D), one launch after the other."""
    for t in range(pre.shape[1]):
        torch.bmm(room.h, room.matrices.mT, out=room.product)
        launch(outputs[:, t], room, cell, pre[:, t], None if real is None else real[..., t])


def recordable(device: torch.device) -> bool:
    """Whether a graph may be recorded: not while another is, which holds what is done here."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def recorded_tokens(tokens: int, size: int) -> int:
    """Tokens of a chunk that is recorded, a power of two so that texts of all lengths share recordings; 0 for none.

    Args:
        tokens: of the text.
        size: bytes of a token's inputs.
    """
    most = min(CHUNK, tokens, RECORDED_BYTES // max(1, size))
    return 1 << (most.bit_length() - 1) if most >= FEWEST else 0


def recording_of(shape: Shape, device: torch.device) -> "Recording":
    """One for each stream, as those that run at once would write over each other."""
    with torch.cuda.device(device):
        return recorded(shape, device, torch.cuda.current_stream().cuda_stream)


@functools.lru_cache(maxsize=RECORDINGS)
def recorded(shape: Shape, device: torch.device, stream: int) -> "Recording":
    return Recording(shape, device)


class Recording:
    """A chunk's tokens of a scan as a graph that reads and writes the same memory whenever it is replayed."""

    def __init__(self, shape: Shape, device: torch.device):
        with torch.inference_mode(False):  # memory that may be written inside inference mode and outside
            self.room = Room.of(shape, device)
            like = self.room.product
            members, heads, batch, chunk = shape.members, shape.heads, shape.batch, shape.chunk
            self.cell = shape.cell
            self.pre = like.new_empty(members, chunk, heads, batch, shape.gates, shape.size)
            self.outputs = like.new_empty(members, chunk, heads, batch, shape.size)
            self.real = like.new_empty(members, batch, chunk, dtype=torch.bool) if shape.masked else None
            self.replay = captured(lambda: advance_plainly_(self.room, self.cell, self.outputs, self.pre, self.real))

    def advance_(self, outputs: Tensor, pre: Tensor, real: Tensor | None) -> None:
        """`advance_plainly_`, in one launch for a whole chunk."""
        if pre.shape[1] < self.pre.shape[1]:
            return advance_plainly_(self.room, self.cell, outputs, pre, real)
        self.pre.copy_(pre)
        if self.real is not None and real is not None:
            self.real.copy_(real)
        self.replay()
        outputs.copy_(self.outputs)


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """What `run` launches, as one launch."""
    run()  # compiles, and has cuBLAS set up: a recording can hold neither
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def launch(outputs: Tensor, room: Room, cell: str, pre: Tensor, real: Tensor | None) -> None:
    """New slots and outputs, (P, N, B, D), of a token with inputs `pre`, (P, N, B, G, D), and the room's R h."""
    _, heads, batch, gates, size = pre.shape
    rows = outputs.numel() // size
    if not rows:
        return
    with on_device_of(outputs):
        gates_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(size, UNITS))](
            outputs,
            room.slots,
            room.h,
            room.product,
            room.bias,
            pre,
            None if real is None else real.view(torch.uint8),
            *(rows, heads, batch, size),
            *outputs.stride()[:3],
            *pre.stride()[:4],
            *mask_strides(None if real is None else real.unsqueeze(-1))[:2],
            CELL=cell,
            GATES=gates,
            SLOTS=len(room.slots),
            ROWS=ROWS,
            UNITS=UNITS,
        )


@triton.jit(do_not_specialize=["rows", "batch"])
def gates_kernel(
    outputs,
    slots,
    narrow,
    product,
    candidate_bias,
    pre,
    real,
    rows,
    heads,
    batch,
    size,
    out_member,
    out_head,
    out_row,
    pre_member,
    pre_head,
    pre_row,
    pre_gate,
    real_member,
    real_row,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """One program: UNITS units of ROWS of the P·N·B rows, each a head of a sequence of a member."""
    row, unit = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    here = row < rows
    there = here[:, None] & (unit < size)[None, :]  # (ROWS, UNITS)
    wide = row.to(tl.int64)
    of_all, sequence = wide // batch, wide % batch  # the head among all members'
    member, head = of_all // heads, of_all % heads
    place = wide[:, None] * size + unit[None, :]
    h, c, n, m = load_slots(slots + place, rows.to(tl.int64) * size, there, SLOTS)
    bias = 0.0
    if CELL == "gru":
        bias = tl.load(candidate_bias + of_all[:, None] * size + unit[None, :], mask=there, other=0.0).to(tl.float32)
    inputs = pre + (member * pre_member + head * pre_head + sequence * pre_row)[:, None] + unit[None, :]
    a0, a1, a2, a3 = load_gates(inputs, pre_gate, there, GATES)
    r0, r1, r2, r3 = load_gates(product + (wide * GATES)[:, None] * size + unit[None, :], size, there, GATES)
    a0, a1, a2, a3 = a0.to(tl.float32), a1.to(tl.float32), a2.to(tl.float32), a3.to(tl.float32)
    r0, r1, r2, r3 = r0.to(tl.float32), r1.to(tl.float32), r2.to(tl.float32), r3.to(tl.float32)
    new_h, new_c, new_n, new_m = new_state(CELL, a0, a1, a2, a3, r0, r1, r2, r3, bias, h, c, n, m)
    if real is not None:
        now = (tl.load(real + member * real_member + sequence * real_row, mask=here, other=0) != 0)[:, None]
        new_h, new_c = tl.where(now, new_h, h), tl.where(now, new_c, c)
        new_n, new_m = tl.where(now, new_n, n), tl.where(now, new_m, m)
    store_slots(slots + place, rows.to(tl.int64) * size, there, SLOTS, new_h, new_c, new_n, new_m)
    dtype: tl.constexpr = narrow.dtype.element_ty
    tl.store(narrow + place, rounded(new_h, dtype), mask=there)
    at = outputs + (member * out_member + head * out_head + sequence * out_row)[:, None] + unit[None, :]
    tl.store(at, rounded(new_h, dtype), mask=there)
