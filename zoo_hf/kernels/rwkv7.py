"""The recurrence of RWKV-7 over all tokens in one call, with a head's state in registers where there is a GPU.

    S ← diag(w) S − (a∘κ) (Sᵀκ)ᵀ + k vᵀ      o = Sᵀ r

Forward only: the operation has no gradients.

Letters: P members, B sequences, T tokens of each, N heads of D units.

References:
    Bo Peng et al., "RWKV-7 'Goose' with Expressive Dynamic State Evolution", 2025, arXiv:2503.14456.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .choice import backend
from .displace import FLOATS
from .folding import folded, unfolded


CHUNKED = 64  # tokens from which fla's products of blocks are worth their launches


@torch.library.custom_op("zoo_hf::rwkv7_scan", mutates_args=())
def rwkv7_scan(
    r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, kappa: Tensor, rate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs o (B, T, N, D) and S after the last token, both in the state's dtype.

    Args:
        r, log_decay, k, v, kappa, rate: receptance, log w ≤ 0, key, value, κ and a, (B, T, N, D) each, of any
            floating dtypes; they are computed with in the state's.
        state: S before the first token, (B, N, D, D) [key, value].
    """
    steps = r, log_decay, k, v, kappa, rate
    kind = backend(preferred(steps, state), state.device)
    if kind == "fla":
        return with_fla(steps, state)
    if kind == "triton":
        from .gpu.rwkv7 import launch

        return launch(steps, state)
    return scanned_plainly(steps, state)


@rwkv7_scan.register_fake
def _(r: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    state = others[-1]
    return r.new_empty(r.shape, dtype=state.dtype), torch.empty_like(state, memory_format=torch.contiguous_format)


@rwkv7_scan.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """Members are more sequences."""
    found = rwkv7_scan(*folded(tensors, in_dims, info.batch_size))
    return unfolded(found, info.batch_size), (0, 0)


def suits(steps: Sequence[Tensor], state: Tensor) -> bool:
    """Whether `rwkv7_scan(*steps, state)` is faster here than products of torch's, and no gradients are wanted."""
    return not torch.is_grad_enabled() and backend(preferred(steps, state), state.device) != "plain"


def preferred(steps: Sequence[Tensor], state: Tensor) -> list[str]:
    """Backends that suit the arguments; fla's, which rounds products of blocks to 16 bits, where it is asked for."""
    dtypes = {each.dtype for each in steps}
    if state.dtype is not torch.float32 or not dtypes <= {*FLOATS}:
        return ["plain"]
    return ["triton", "fla", "plain"]


def scanned_plainly(steps: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """The plain twin, token by token."""
    r, log_decay, k, v, kappa, rate = (each.to(state.dtype) for each in steps)
    outputs, state = (
        r.new_empty(r.shape),
        state.clone(),
    )  # never the argument itself
    for t in range(r.shape[1]):
        held = (kappa[:, t, :, :, None] * state).sum(-2, keepdim=True)  # (B, N, 1, D), the value at κ
        forgotten = (rate[:, t] * kappa[:, t]).unsqueeze(-1) * held
        written = k[:, t, :, :, None] * v[:, t, :, None]
        state = log_decay[:, t].exp().unsqueeze(-1) * state - forgotten + written  # (B, N, D, D)
        outputs[:, t] = (r[:, t, :, :, None] * state).sum(-2)
    return outputs, state.contiguous()  # whatever strides the arguments have


def with_fla(steps: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """flash-linear-attention's: blocks on a GPU where they pay off, else token by token in the state's precision."""
    from fla.ops.rwkv7 import chunk_rwkv7, fused_recurrent_rwkv7

    dtypes = {each.dtype for each in steps}
    narrow = len(dtypes) == 1 and torch.float32 not in dtypes  # as blocks' products are
    blocks = narrow and steps[0].shape[1] >= CHUNKED and state.device.type == "cuda"
    scan = chunk_rwkv7 if blocks else fused_recurrent_rwkv7
    r, log_decay, k, v, kappa, rate = steps if blocks else (each.to(state.dtype) for each in steps)
    arguments = r, log_decay, k, v, -kappa, rate * kappa
    outputs, after = scan(*arguments, scale=1.0, initial_state=state, output_final_state=True)
    return outputs.to(state.dtype), after
