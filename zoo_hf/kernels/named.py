"""A weight that stands for W + s Z by what names Z: operations that know of it share W and make the signs of Z."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from ..noise import parameter_id


class Name(NamedTuple):
    """What names the displacements s Z of a parameter, and their lengths.

    Args:
        index: of the members' directions, (P,) int64, or () of one member.
        scale: s, float32, of the same shape.
        seed, step: of all members' directions.
        name: of the parameter, in the unwrapped model.
    """

    index: Tensor  # type: ignore[assignment]  # the field's own word, although a tuple has a method of that name
    scale: Tensor
    seed: int
    step: int
    name: str

    @property
    def numbers(self) -> tuple[int, int, int]:
        """Of all members: the parameter, the step and the seed, as counters of `noise` have them."""
        return parameter_id(self.name), self.step, self.seed


@runtime_checkable
class Named(Protocol):
    """Such a weight; `direction` is seed, step and the parameter's name."""

    base: Tensor
    index: Tensor
    scale: Tensor

    @property
    def direction(self) -> tuple[int, int, str]: ...


def apart(weight: Any) -> tuple[Tensor, Name | None]:
    """W and what names the displacement, or the weight itself and None."""
    if isinstance(weight, Named):
        return weight.base, Name(weight.index, weight.scale, *weight.direction)
    return weight, None
