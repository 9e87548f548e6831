"""Members as more sequences: what `torch.func.vmap` makes of a scan.

Letters: P members, B sequences.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor


def folded(tensors: Sequence[Tensor], dims: Iterable[int | None], members: int) -> list[Tensor]:
    """(P·B, …) of each; one without a member axis, (B, …), is all members'."""
    stacked = (
        tensor.expand(members, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, dims, strict=True)
    )
    return [tensor.flatten(0, 1) for tensor in stacked]


def unfolded(tensors: Iterable[Tensor], members: int) -> tuple[Tensor, ...]:
    """(P, B, …) of each."""
    return tuple(tensor.unflatten(0, (members, -1)) for tensor in tensors)
