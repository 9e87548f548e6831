"""An objective of the user's own, which needs no gradient: an error rate, a reward, whatever judges a model."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class OwnObjective:
    """What `ZOOTrainer(compute_objective=…)` minimises in place of the model's loss.

    Args:
        function: of the model and a batch, or of these and the model's outputs for it. It returns a number to be
            minimised: a float, or a tensor with one entry. It sees displaced weights, in inference mode, and must not
            change them.

    Attributes:
        total, rows: of an evaluation, Σ (objective · rows of its batch), and rows.

    Raises:
        ValueError: `function` takes other arguments.
    """

    def __init__(self, function: Callable[..., Any]):
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        taken = [p for p in inspect.signature(function).parameters.values() if p.kind in kinds]
        needed = [p for p in taken if p.default is inspect.Parameter.empty]
        if len(needed) not in (2, 3):
            raise ValueError(
                "`compute_objective` must take (model, inputs) or (model, inputs, outputs), got "
                f"{called(function)} with {[p.name for p in needed]}."
            )
        self.function, self.of_outputs = function, len(needed) == 3
        self.total = self.rows = 0.0

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The objective of a batch, a scalar; numbers become float64.

        Raises:
            ValueError: it is no single number.
        """
        arguments = (model, inputs, model(**inputs)) if self.of_outputs else (model, inputs)
        value = self.function(*arguments)
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value, dtype=torch.float64)
        if value.numel() != 1:
            raise ValueError(
                f"`compute_objective` must return one number, got a tensor of shape {tuple(value.shape)} from "
                f"{called(self.function)}."
            )
        return value.reshape(())

    @torch.no_grad()
    def add(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Count a batch of an evaluation."""
        rows = next((len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()), 1)
        self.total += rows * self(model, inputs).item()
        self.rows += rows

    def mean(self, reduce: Callable[[Tensor], Tensor]) -> float:
        """Of all rows of an evaluation on all processes, whose sums `reduce` adds; the next one starts anew."""
        total, rows = reduce(torch.tensor([self.total, self.rows], dtype=torch.float64)).tolist()
        self.total = self.rows = 0.0
        return total / rows if rows else float("nan")


def called(function: Any) -> str:
    """The name of a function."""
    return getattr(function, "__qualname__", type(function).__name__)
