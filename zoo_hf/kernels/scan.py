"""The scans of recurrent cells for a population: all tokens of all members' heads in one call.

The cells' formulas stand in zoo_hf/models/{lstm,gru,slstm,elman}.py, with their plain scans. Forward only: the
operations have no formula for a backward pass and run under `torch.no_grad` or inference mode.

Letters: P members, T tokens of each of B sequences, N heads of D units, G gates, S slots of the state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..noise import spans
from .choice import backend
from .displace import FLOATS
from .named import Name, apart


HEAD_SIZE = 128
HEAD_BYTES = 1 << 17  # in shared memory, of 227 KiB
GROUP_BYTES = 1 << 27  # of members' displaced matrices that exist at once, where a head's do not fit on the chip


def fits(gates: int, size: int, dtype: torch.dtype) -> bool:
    """Whether R of a head, (G, D, D), stays on the chip: then the kernel that runs all tokens is taken."""
    return size <= HEAD_SIZE and gates * width(size) ** 2 * dtype.itemsize <= HEAD_BYTES


def width(size: int) -> int:
    """D in that kernel, whose additional units are always zero: a power of two."""
    return max(16, 1 << (size - 1).bit_length())


class Task(NamedTuple):
    """A scan's arguments, as `recurrent_scan_population` has them."""

    cell: str
    pre: Tensor
    state: Tensor
    recurrent: Tensor
    candidate_bias: Tensor | None
    real: Tensor | None
    name: Name | None

    def of(self, own: slice) -> "Task":
        """That of some members, whose R is made."""
        bias = None if self.candidate_bias is None else self.candidate_bias[own]
        real = self.real[own] if self.real is not None and self.real.dim() == 3 else self.real
        return Task(self.cell, self.pre[own], self.state[own], self.matrices(own), bias, real, None)

    def matrices(self, own: slice) -> Tensor:
        """R of some members, (P, G, N, D, D), or (1, G, N, D, D) where it is the same for all."""
        if self.name is None:
            return self.recurrent if len(self.recurrent) == 1 else self.recurrent[own]
        index, scale, *names = self.name
        flat = self.recurrent.reshape(-1)
        made = torch.ops.zoo_hf.displaced_members(flat, index[own], scale[own], *names, "rademacher")
        return made.view(-1, *self.recurrent.shape[1:])


@torch.library.custom_op("zoo_hf::recurrent_scan_population", mutates_args=())
def recurrent_scan_population(
    cell: str,
    pre: Tensor,
    state: Tensor,
    recurrent: Tensor,
    candidate_bias: Tensor | None,
    real: Tensor | None,
    index: Tensor | None,
    scale: Tensor | None,
    seed: int,
    step: int,
    name: str,
) -> tuple[Tensor, Tensor]:
    """Outputs (P, T, N, B, D) in the dtype of `pre`, and the state after the last token, in its own.

    Products are of the dtype of `pre`; the kernels keep the state in float32 from the first token to the last.

    Args:
        cell: "lstm", "gru", "slstm" or "elman".
        pre: W x + b, (P, T, N, B, G, D), of any strides.
        state: (P, S, N, B, D), before the first token; the sLSTM's n = 0 says that there was none, whatever its m.
        recurrent: R, [gate, head, out, in], (P, G, N, D, D), or (1, G, N, D, D) for all members.
        candidate_bias: the GRU's, (P, N, D); None for other cells.
        real: where False holds the state, (B, T) or (P, B, T) booleans; None if all tokens are real.
        index, scale: (P,) int64 and float32, or None. With them R is all members', and that of member m is
            R + scale_m Z_m, with the signs Z_m of direction (seed, step, index_m); they never exist all at once.
        name: of R in the unwrapped model.
    """
    whole = None if index is None or scale is None else Name(index, scale, seed, step, name)
    pre = pre if pre.stride(-1) == 1 else pre.contiguous()
    task = Task(cell, pre, state, recurrent, candidate_bias, real, whole)
    check(task)
    outputs, final = outputs_of(pre), torch.empty_like(state, memory_format=torch.contiguous_format)
    if backend_of(task) == "plain":
        in_groups_(plain_scan_, outputs, final, task)
        return outputs, final
    from .gpu.gates import scan_
    from .gpu.scan import launch

    if fits(pre.shape[4], pre.shape[5], pre.dtype):
        launch(outputs, final, task)
    else:
        in_groups_(scan_, outputs, final, task)
    return outputs, final


@recurrent_scan_population.register_fake
def _(cell: str, pre: Tensor, state: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return outputs_of(pre), torch.empty_like(state, memory_format=torch.contiguous_format)


def outputs_of(pre: Tensor) -> Tensor:
    """Room for outputs (P, T, N, B, D), in memory as (P, B, T, N, D): heads of a token are neighbours."""
    members, tokens, heads, batch, _, size = pre.shape
    return pre.new_empty(members, batch, tokens, heads, size).permute(0, 2, 3, 1, 4)


@torch.library.custom_op("zoo_hf::recurrent_scan", mutates_args=())
def recurrent_scan(
    cell: str,
    pre: Tensor,
    state: Tensor,
    recurrent: Tensor,
    candidate_bias: Tensor | None,
    real: Tensor | None,
    index: Tensor | None,
    scale: Tensor | None,
    seed: int,
    step: int,
    name: str,
) -> tuple[Tensor, Tensor]:
    """Outputs (T, N, B, D) and final state (S, N, B, D) of one member; under `torch.func.vmap`, of each in one call.

    Args:
        Those of `recurrent_scan_population` for one member: pre (T, N, B, G, D), state (S, N, B, D), recurrent
        (G, N, D, D), candidate_bias (N, D), real (B, T), index and scale ().
    """
    tensors = (with_members(x, None, 1) for x in (pre, state, recurrent, candidate_bias, real, index, scale))
    outputs, final = recurrent_scan_population(cell, *tensors, seed, step, name)
    return outputs[0], final[0]


@recurrent_scan.register_fake
def _(cell: str, pre: Tensor, state: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return outputs_of(pre[None])[0], torch.empty_like(state, memory_format=torch.contiguous_format)


@recurrent_scan.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], cell: str, *arguments: Any) -> tuple[tuple[Tensor, ...], Any]:
    tensors, names, dims = arguments[:7], arguments[7:], in_dims[1:8]
    made = [with_members(tensor, dim, info.batch_size) for tensor, dim in zip(tensors, dims, strict=True)]
    if dims[2] is None:  # R stays one for all members, and so does a mask
        made[2] = tensors[2][None]
    if dims[4] is None:
        made[4] = tensors[4]
    return recurrent_scan_population(cell, *made, *names), (0, 0)


def with_members(tensor: Tensor | None, dim: int | None, members: int) -> Tensor | None:
    """A tensor with its member axis, `dim`, in front, or if it has none, repeated without a copy."""
    if tensor is None:
        return None
    return tensor.expand(members, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def check(task: Task) -> None:
    """Raises: ValueError, with the remedy."""
    cell, pre, _, recurrent, bias, _, name = task
    if cell not in STEPS:
        raise ValueError(f"`cell` must be one of {[*STEPS]}, got {cell!r}.")
    heads, gates, size = pre.shape[2], *pre.shape[4:]
    shape, members = (gates, heads, size, size), 1 if name is not None else len(pre)
    if recurrent.shape[1:] != shape or len(recurrent) not in (1, members):
        raise ValueError(f"`recurrent` must be {(members, *shape)}, got {tuple(recurrent.shape)}.")
    if (cell == "gru") != (bias is not None):
        raise ValueError(f"`candidate_bias` is for the cell 'gru' and for no other, got it so for {cell!r}.")


def backend_of(task: Task) -> str:
    known = {task.pre.dtype, task.state.dtype, task.recurrent.dtype} <= {*FLOATS}
    return backend(["triton", "plain"] if known else ["plain"], task.pre.device)


def in_groups_(scan_: Callable[[Tensor, Tensor, Task], None], outputs: Tensor, final: Tensor, task: Task) -> None:
    """`scan_` for so many members at once that GROUP_BYTES hold their matrices, or for one."""
    size = max(1, task.recurrent[0].nbytes)
    for first, last in spans(len(outputs), max(1, GROUP_BYTES // size)):
        own = slice(first, last)
        scan_(outputs[own], final[own], task.of(own))


def plain_scan_(outputs: Tensor, final: Tensor, task: Task) -> None:
    """The plain twin: heads of all members are heads of one layer, whose plain scan it is."""
    cell, pre, state, recurrent, candidate_bias, real, _ = task
    members, tokens, heads, batch, _, _ = pre.shape
    blocks = recurrent.to(pre.dtype).permute(0, 2, 4, 1, 3).flatten(-2)  # (P or 1, N, D, G·D)
    blocks = blocks.expand(members, *blocks.shape[1:]).flatten(0, 1)  # (P·N, D, G·D)
    wide = torch.promote_types(pre.dtype, torch.float32) if cell == "slstm" else pre.dtype
    slots = [slot.flatten(0, 1) for slot in state.to(wide).unbind(1)]  # (P·N, B, D) each
    bias = None if candidate_bias is None else candidate_bias.flatten(0, 1).unsqueeze(1)  # (P·N, 1, D)
    if cell == "slstm":
        slots[3] = slots[3].masked_fill(slots[2] == 0, -torch.inf)
    for t in range(tokens):
        inputs = pre[:, t].flatten(-2).flatten(0, 1)  # (P·N, B, G·D)
        new = STEPS[cell](inputs.to(wide), torch.bmm(slots[0].to(pre.dtype), blocks).to(wide), bias, *slots)
        if real is not None:
            now = real[..., t].expand(members, batch).repeat_interleave(heads, 0).unsqueeze(-1)  # (P·N, B, 1)
            new = [torch.where(now, after, before) for after, before in zip(new, slots, strict=True)]
        slots = new
        outputs[:, t] = slots[0].unflatten(0, (members, heads))
    if cell == "slstm":
        slots[3] = slots[3].masked_fill(slots[2] == 0, 0)
    final.copy_(torch.stack(slots).unflatten(1, (members, heads)).transpose(0, 1))


def lstm_step(a: Tensor, r: Tensor, bias: None, h: Tensor, c: Tensor) -> list[Tensor]:
    """New slots from the inputs' part of the gates and the state's, (P·N, B, G·D) each."""
    i, f, g, o = (a + r).chunk(4, dim=-1)
    c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
    return [o.sigmoid() * c.tanh(), c]


def gru_step(a: Tensor, r: Tensor, bias: Tensor, h: Tensor) -> list[Tensor]:
    (reset, update, candidate), (r_reset, r_update, r_candidate) = a.chunk(3, dim=-1), r.chunk(3, dim=-1)
    candidate = torch.addcmul(candidate, (reset + r_reset).sigmoid(), r_candidate + bias).tanh()
    return [torch.addcmul(candidate, (update + r_update).sigmoid(), h - candidate)]


def slstm_step(a: Tensor, r: Tensor, bias: None, h: Tensor, c: Tensor, n: Tensor, m: Tensor) -> list[Tensor]:
    i, f, z, o = (a + r).chunk(4, dim=-1)
    kept = F.logsigmoid(f) + m
    m = torch.maximum(kept, i)
    keep, write = (kept - m).exp(), (i - m).exp()
    c, n = torch.addcmul(keep * c, write, z.tanh()), torch.addcmul(write, keep, n)
    return [o.sigmoid() * (c / n), c, n, m]


def elman_step(a: Tensor, r: Tensor, bias: None, h: Tensor) -> list[Tensor]:
    return [(a + r).tanh()]


SLOTS = {"lstm": 2, "gru": 1, "slstm": 4, "elman": 1}
STEPS: dict[str, Callable[..., list[Tensor]]] = {
    "lstm": lstm_step,
    "gru": gru_step,
    "slstm": slstm_step,
    "elman": elman_step,
}


def scan(cell: str, inputs: Tensor, state: Tensor, weights: Any, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H) and final state (B, S, H) of one layer, as the cell's plain scan has them.

    Args:
        inputs, state, weights, real: of the plain scan; R may stand for a displaced one, see `named`.
    """
    gates, heads, size, _ = weights.recurrent.shape
    pre = F.linear(inputs, weights.input, weights.bias).unflatten(-1, (gates, heads, size))  # (B, T, G, N, D)
    slots = state.unflatten(-1, (heads, size)).permute(1, 2, 0, 3)  # (S, N, B, D)
    if cell == "slstm":
        slots = slots.to(torch.promote_types(pre.dtype, torch.float32))
    bias = weights.candidate_bias.view(heads, size) if cell == "gru" else None
    recurrent, name = apart(weights.recurrent)
    names = (None, None, 0, 0, "") if name is None else tuple(name)
    tensors = pre.permute(1, 3, 0, 2, 4), slots, recurrent, bias, real
    outputs, final = torch.ops.zoo_hf.recurrent_scan(cell, *tensors, *names)
    return outputs.permute(2, 0, 1, 3).flatten(-2), final.permute(2, 0, 1, 3).flatten(-2)
