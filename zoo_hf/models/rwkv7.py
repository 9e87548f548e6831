"""The recurrence of RWKV-7: the plain scan, its form in blocks of matrix products, and the choice between them.

    S ← diag(w) S − (a∘κ) (Sᵀκ)ᵀ + k vᵀ      o = Sᵀ r

A head's matrix S maps keys to values. Along κ, of length 1, it forgets the value that it holds at the rate a, which is
one step of gradient descent on |Sᵀκ − …|²; every row decays by its own w, and v is written at the key k.

Letters: B sequences, T tokens of each, N heads of D units, H = N·D, C tokens of a block, J = T/C blocks.

References:
    Bo Peng et al., "RWKV-7 'Goose' with Expressive Dynamic State Evolution", 2025, arXiv:2503.14456.
    Songlin Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024,
    arXiv:2406.06484 (the products of a block).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import kernel


BLOCK = 16  # tokens; decays are at least exp(−e^(−1/2)) = 0.545, so that their product in a block is at least 6e-5
SEGMENT = 4 * BLOCK  # tokens; more would not stay in a CPU's cache


class Steps(NamedTuple):
    """What the recurrence reads at every token, (B, T, N, D) each.

    Args:
        r: receptance, which reads.
        log_decay: log w ≤ 0.
        k: key that is written at.
        v: value that is written.
        kappa: κ, key that is forgotten at.
        rate: a, the in-context learning rate, in 0…1.
    """

    r: Tensor
    log_decay: Tensor
    k: Tensor
    v: Tensor
    kappa: Tensor
    rate: Tensor

    def held(self, real: Tensor) -> "Steps":
        """The same, where `real` (B, T) is False the state is held: w = 1, a = 0, k = 0."""
        real = real[:, :, None, None]
        return self._replace(log_decay=self.log_decay * real, k=self.k * real, rate=self.rate * real)


def rwkv7(steps: Steps, state: Tensor) -> tuple[Tensor, Tensor]:
    """`rwkv7_scan` by the fastest way there is, in the state's precision: a kernel, blocks, or else the scan."""
    fused = kernel("rwkv7", steps, state)
    if fused is not None:
        return fused(*steps, state)
    steps = Steps(*(entries.to(state.dtype) for entries in steps))
    with torch.autocast(state.device.type, enabled=False):
        return (rwkv7_scan if steps.r.shape[1] < BLOCK else rwkv7_blocks)(steps, state)


def rwkv7_scan(steps: Steps, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs o (B, T, N, D) and S after the last token, one token after the other.

    Args:
        steps: see `Steps`.
        state: S before the first token, (B, N, D, D) [key, value]; not modified.
    """
    decay = steps.log_decay.exp().unsqueeze(-1)  # (B, T, N, D, 1), as all columns
    written, forgotten = steps.k.unsqueeze(-1), (steps.rate * steps.kappa).unsqueeze(-1)
    values, reads, removals = steps.v.unsqueeze(-2), steps.r.unsqueeze(-2), steps.kappa.unsqueeze(-2)  # rows
    outputs = []
    for t in range(steps.r.shape[1]):
        held = removals[:, t] @ state  # (B, N, 1, D), the value at κ
        state = decay[:, t] * state - forgotten[:, t] * held + written[:, t] * values[:, t]
        outputs.append(reads[:, t] @ state)
    return torch.cat(outputs, dim=-2).transpose(1, 2), state


@torch.compiler.disable  # left whole: inductor would unroll it over blocks
def rwkv7_blocks(steps: Steps, state: Tensor) -> tuple[Tensor, Tensor]:
    """`rwkv7_scan`, `BLOCK` tokens at a time, with what does not need the state made for `SEGMENT` tokens at once."""
    outputs = []
    for segment in zip(*(entries.split(SEGMENT, dim=1) for entries in steps), strict=True):
        output, state = rwkv7_segment(Steps(*segment), state)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def rwkv7_segment(steps: Steps, state: Tensor) -> tuple[Tensor, Tensor]:
    """`rwkv7_scan` with nothing but matrix products within a block.

    With e_t = Π_{s≤t} w_s since the block's start and S₀ the state there, the state after token t is

        S_t = diag(e_t) (S₀ + Σ_{s≤t} (a_s∘κ_s/e_s) u_sᵀ + (k_s/e_s) v_sᵀ),    u_s = −S_{s−1}ᵀκ_s

    so that r_t reads a sum over s ≤ t, and the u of a block solve a triangular system: with κ_t∘e_{t−1} in place of
    r_t∘e_t that sum, over s < t, is −u_t.
    """
    length, heads = steps.r.shape[1:3]
    v, readers, writers, end = scaled_by_decay(steps)
    of_u, of_v = (readers @ writers.mT * earlier(v)).chunk(2, dim=-1)  # (J, BN, 2C, C) each: weight of token s at t
    known = of_v @ v  # (J, BN, 2C, D)
    one = torch.eye(BLOCK, dtype=v.dtype, device=v.device)
    system = one + of_u[..., :BLOCK, :]
    inverse = torch.linalg.solve_triangular(system, -one.expand_as(system), upper=False, unitriangular=True)
    state, outputs = state.flatten(0, 1), []
    for j in range(len(v)):
        read = torch.baddbmm(known[j], readers[j], state)  # (BN, 2C, D)
        u = inverse[j] @ read[:, :BLOCK]
        outputs.append(torch.baddbmm(read[:, BLOCK:], of_u[j, :, BLOCK:], u))
        state = end[j] * torch.baddbmm(state, writers[j].mT, torch.cat([u, v[j]], dim=1))
    output = torch.cat(outputs, dim=1).unflatten(0, (-1, heads)).transpose(1, 2)  # (B, JC, N, D)
    return output[:, :length], state.unflatten(0, (-1, heads))


def scaled_by_decay(steps: Steps) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """v (J, BN, C, D), κ and r times the decay before them (J, BN, 2C, D), a∘κ and k over that after them, and e_C."""
    missing = -steps.r.shape[1] % BLOCK
    if missing:
        steps = Steps(*(F.pad(entries, (0, 0, 0, 0, 0, missing)) for entries in steps))  # zeros hold the state
    r, log_decay, k, v, kappa, rate = (entries.unflatten(1, (-1, BLOCK)) for entries in steps)  # (B, J, C, N, D) each
    decay = F.pad(log_decay, (0, 0, 0, 0, 1, 0)).cumsum(2).exp()  # e, (B, J, C + 1, N, D)
    before, after = decay[:, :, :-1], decay[:, :, 1:]
    growth = after.reciprocal()
    readers = torch.cat([heads_first(kappa * before), heads_first(r * after)], dim=-2).flatten(1, 2)
    writers = torch.cat([heads_first(rate * kappa * growth), heads_first(k * growth)], dim=-2).flatten(1, 2)
    return heads_first(v).flatten(1, 2), readers, writers, heads_first(after[:, :, -1:]).mT.flatten(1, 2)


def heads_first(entries: Tensor) -> Tensor:
    """(B, J, C, N, D) to (J, B, N, C, D)."""
    return entries.permute(1, 0, 3, 2, 4)


def earlier(like: Tensor) -> Tensor:
    """(2C, 2C) ones where what token s wrote, u or v, is seen at t: s < t by κ_t, s ≤ t by r_t; zeros elsewhere."""
    seen = torch.ones(BLOCK, BLOCK, dtype=like.dtype, device=like.device)
    return torch.cat([seen.tril(-1), seen.tril()]).repeat(1, 2)


def previous_tokens(inputs: Tensor, before: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """The last real input before each token, (B, T, H), and the last of all, (B, H).

    Args:
        inputs: (B, T, H).
        before: (B, H), the last real input before these.
        real: (B, T) booleans, False where a position is padding; None if all are real.
    """
    line = torch.cat([before.unsqueeze(1), inputs], dim=1)  # (B, T + 1, H)
    if real is not None:
        places = torch.arange(1, line.shape[1], device=line.device) * real  # (B, T)
        latest = F.pad(places, (1, 0)).cummax(1).values  # (B, T + 1), of the last real input up to each
        line = line.take_along_dim(latest.unsqueeze(-1), dim=1)
    return line[:, :-1], line[:, -1]
