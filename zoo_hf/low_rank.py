"""Low-rank directions: on a matrix E = A Bᵀ/√r, whose factors are (rows + columns)·r entries, and full elsewhere.

The columns of a parameter are its last dimension and all others are its rows; so a block-diagonal recurrent matrix is
one tall matrix. A and B have streams of their own, so that no two entries of any factor or full direction meet.

Letters: G directions, R rows, C columns, r the rank.

References:
    Bidipta Sarkar et al.: Evolution Strategies at the Hyperscale. 2025. arXiv:2511.16652, for the idea that low-rank
    members share the product with the undisplaced matrix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .noise import DISTRIBUTIONS, PURPOSE_LEFT, PURPOSE_RIGHT, Blocks, Direction, Distribution, unpacked


# in the arguments → how all entries, of factors and of parameters that are no matrices, are distributed
ENTRIES = {"low_rank": "rademacher", "low_rank_gaussian": "gaussian"}


@runtime_checkable
class WithMatrices(Protocol):
    """A module with parameters of its own that are multiplied as matrices: their names."""

    matrices: tuple[str, ...]


@dataclass(frozen=True)
class LowRank:
    """Directions that are A Bᵀ/√r on some parameters.

    E has independent entries of variance 1 in expectation over its factors, and rank r at most; for Rademacher factors
    and r = 1 it is a matrix of signs.

    Args:
        matrices: names of the parameters with low-rank directions; all others have full ones.
        rank: r ≥ 1.
        entries: distribution of all entries: "rademacher" or "gaussian".
    """

    matrices: frozenset[str]
    rank: int = 1
    entries: str = "rademacher"

    def factors(
        self, directions: Sequence[Direction], parameters: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """A/√r, (G, R, r), and B, (G, C, r), in float32 for each of some matrices, made in one call."""
        if not parameters:
            return {}
        device = next(iter(parameters.values())).device
        wanted: list[tuple[Blocks, int]] = []
        for name, parameter in parameters.items():
            numels = (self.rank * length for length in sides(parameter.shape))
            wanted += zip(parts_of(self, name, parameter.shape), numels, strict=True)
        rows = [row.unflatten(1, (-1, self.rank)) for row in unpacked(self.distribution, directions, wanted, device)]
        # A alone is scaled: for r = 1 both are exact, and so is their product
        return {
            name: (a if self.rank == 1 else a * self.rank**-0.5, b)
            for name, a, b in zip(parameters, rows[::2], rows[1::2], strict=True)
        }

    @property
    def distribution(self) -> Distribution:
        return DISTRIBUTIONS[self.entries]


Kind = str | LowRank  # of directions: the name of a distribution of all entries, or low-rank


def entries_of(kind: Kind) -> str:
    """The name of the distribution of the entries of parameters with full directions."""
    return kind.entries if isinstance(kind, LowRank) else kind


def full(kind: Kind) -> Distribution:
    """How the entries of parameters with full directions are distributed."""
    return DISTRIBUTIONS[entries_of(kind)]


def is_low_rank(kind: Kind, name: str) -> bool:
    """Whether a parameter's directions are low-rank."""
    return isinstance(kind, LowRank) and name in kind.matrices


def factor_bytes(kind: Kind, shape: torch.Size) -> int:
    """What the factors of one direction take."""
    assert isinstance(kind, LowRank)
    return 4 * kind.rank * sum(sides(shape))


def sides(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a parameter that is a matrix."""
    return shape.numel() // shape[-1], shape[-1]


def parts_of(kind: Kind, name: str, shape: torch.Size) -> list[Blocks]:
    """The streams of a direction on a parameter: of all entries, or of A and of B."""
    size = full(kind).entries_per_block
    if not is_low_rank(kind, name):
        return [Blocks(name, 0, -(-shape.numel() // size))]
    assert isinstance(kind, LowRank)
    purposes = zip(sides(shape), (PURPOSE_LEFT, PURPOSE_RIGHT), strict=True)
    return [Blocks(name, 0, -(-kind.rank * length // size), purpose) for length, purpose in purposes]


def matrix_names(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that are multiplied as matrices.

    They are the weights of linear and embedding layers (also of a head tied to one), and what modules call `matrices`.
    """
    found = set()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__name__ == "Conv1D":  # of transformers' gpt2
            found.add(module.weight)
        elif isinstance(module, WithMatrices):
            found.update(module.get_parameter(name) for name in module.matrices)
    return frozenset(name for name, parameter in model.named_parameters() if parameter in found)


def kind_of(distribution: str, model: nn.Module, rank: int) -> Kind:
    """The directions that the arguments of a run ask for."""
    if distribution not in ENTRIES:
        return distribution
    return LowRank(matrix_names(model), rank, ENTRIES[distribution])
