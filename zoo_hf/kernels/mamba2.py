"""The recurrence of Mamba-2 over all tokens in one call, with a head's state in registers where there is a GPU.

    S ← exp(Δ A) S + B (Δ x)ᵀ      y = Sᵀ C

Forward only: the operation has no gradients.

Letters: B sequences, T tokens of each, G groups of R heads of P values, N state size.

References:
    Tri Dao, Albert Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
    Space Duality", 2024, arXiv:2405.21060.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .choice import backend
from .displace import FLOATS
from .folding import folded, unfolded


@torch.library.custom_op("zoo_hf::mamba2_scan", mutates_args=())
def mamba2_scan(x: Tensor, step: Tensor, b: Tensor, c: Tensor, rates: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Sᵀ C (B, T, G, R, P) after every token, and S after the last, both in the state's dtype.

    Args:
        x: (B, T, G, R, P), of any floating dtype, as all others; they are computed with in the state's.
        step: Δ ≥ 0, (B, T, G, R); 0 holds the state.
        b, c: what is written with x, and what is read, (B, T, G, N).
        rates: A < 0, (G, R), or (B, G, R) for sequences of several members, not under vmap.
        state: S before the first token, (B, G, N, R, P).
    """
    arguments = x, step, b, c, rates, state
    if backend(preferred(arguments), state.device) == "triton":
        from .gpu.mamba2 import launch

        return launch(*arguments)
    return scanned_plainly(*arguments)


@mamba2_scan.register_fake
def _(x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    state = others[-1]
    return x.new_empty(x.shape, dtype=state.dtype), torch.empty_like(state, memory_format=torch.contiguous_format)


@mamba2_scan.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """Members are more sequences."""
    *tokens, rates, state = tensors
    *dims, of_rates, of_state = in_dims
    *tokens, state = folded([*tokens, state], [*dims, of_state], info.batch_size)
    if of_rates is not None:  # (P, G, R), for every sequence of a member
        rates = rates.movedim(of_rates, 0).repeat_interleave(len(state) // info.batch_size, 0)
    return unfolded(mamba2_scan(*tokens, rates, state), info.batch_size), (0, 0)


def suits(inputs: Sequence[Tensor], rates: Tensor, state: Tensor) -> bool:
    """Whether `mamba2_scan(*inputs, rates, state)` has a kernel here, and no gradients are wanted."""
    return not torch.is_grad_enabled() and backend(preferred((*inputs, rates, state)), state.device) != "plain"


def preferred(arguments: Sequence[Tensor]) -> list[str]:
    """Backends that suit the arguments, of which the state is the last, the best first."""
    known = arguments[-1].dtype is torch.float32 and {each.dtype for each in arguments} <= {*FLOATS}
    return ["triton", "plain"] if known else ["plain"]


def scanned_plainly(
    x: Tensor, step: Tensor, b: Tensor, c: Tensor, rates: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The plain twin, token by token."""
    x, step, b, c, rates = (each.to(state.dtype) for each in (x, step, b, c, rates))
    outputs, state = (
        x.new_empty(x.shape),
        state.clone(),
    )  # never the argument itself
    for t in range(x.shape[1]):
        decay = (step[:, t] * rates).exp()[:, :, None, :, None]  # (B, G, 1, R, 1)
        written = b[:, t, :, :, None, None] * (step[:, t].unsqueeze(-1) * x[:, t]).unsqueeze(2)  # (B, G, N, R, P)
        state = decay * state + written
        outputs[:, t] = (c[:, t, :, :, None, None] * state).sum(2)
    return outputs, state.contiguous()  # whatever strides the arguments have
