"""Estimate → weights: one parameter at a time through any torch optimizer, without gradient buffers."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .descent import descend_, in_one_pass
from .estimators import Estimate
from .gradients import gradients, together
from .noise import CHUNK, check_names
from .perturbation import Parameters


logger = logging.getLogger(__name__)

# of an Update, saved with what is the optimizer's
OWN = ("forward_passes", "tokens", "carried_state", "population", "trajectory")

# These treat every parameter by itself; all others, schedule-free ones for instance, are given all of ĝ in one step.
SEPARATE = ("torch.optim.", "transformers.", "bitsandbytes.")
REFUSED = {
    "LBFGS": "it evaluates the loss again within a step",
    "SparseAdam": "it wants sparse gradients, and an estimate is dense",
    "Lomo": "it updates the weights during a backward pass",
    "AdaLomo": "it updates the weights during a backward pass",
    "LayerWiseDummyOptimizer": "it updates the weights during a backward pass; use the optimizer without `_layerwise`",
}


def check_optimizer(kind: str) -> None:
    """Raises: ValueError when an optimizer of this class needs a backward pass, or more than a gradient."""
    if kind in REFUSED:
        raise ValueError(f"Optimizer {kind} cannot take a zero-order estimate: {REFUSED[kind]}. Try adamw_torch.")


class Update(torch.optim.Optimizer):
    """Runs an optimizer's step one parameter at a time, on the estimate that it holds.

    For each parameter: make ĝ, set `.grad`, step, drop it. Neighbouring small parameters share a call, so that ĝ
    never takes more memory than the largest parameter, or 2 MiB. Everything else is the optimizer's own. SGD's step
    on bfloat16 weights, and on a GPU, is made by `descent`: without `.grad`, and rounded stochastically to bfloat16.

    Args:
        optimizer: any torch optimizer that works from `.grad`.
        names: parameter → its name in the unwrapped model, for every parameter of the optimizer.

    Raises:
        ValueError: the optimizer needs a backward pass or more than gradients, or two names share an id.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: dict[Tensor, str]):
        check_optimizer(type(optimizer).__name__)
        self.optimizer = optimizer
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if any(p not in names for p in trained):
            raise ValueError(
                "The optimizer holds parameters that are not the model's: make it from `model.parameters()`."
            )
        self.parameters = {names[p]: p for p in trained}
        check_names(list(self.parameters))
        self.forward_passes = 0  # of the whole run, saved with the optimizer as are the settings it was made with
        self.tokens = 0  # of the batches, each counted once; saved as well
        self.settings: dict[str, Any] = {}
        self.carried_state: Tensor | None = None  # of a recurrent model, from batch to batch, and saved as well
        self.population: dict[int, int] = {}  # a batch's key → members a forward pass, as chosen; saved as well
        self.trajectory = ""  # name of the recorded run; saved as well
        self.estimate: Estimate | None = None
        self.clip = 1.0

    def hold(self, estimate: Estimate) -> None:
        """Keep the estimate for the next `step`."""
        self.estimate, self.clip = estimate, 1.0

    def clip_(self, max_norm: float) -> Tensor:
        """Norm of ĝ, a float64 scalar; the next step uses ĝ · min(1, max_norm / norm). Costs a pass over z."""
        buckets = self._gradients(self.parameters)
        norms = [torch.linalg.vector_norm(g).cpu().double() for bucket in buckets for g in bucket.values()]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        self.clip = min(1.0, max_norm / (norm.item() + 1e-6))
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss to return
        """Apply the held estimate and drop it."""
        assert closure is None, "An estimate is applied, and no loss evaluated again."
        assert self.estimate is not None, "`hold` an estimate before `step`."
        at_once = {name: p for name, p in self.parameters.items() if in_one_pass(self.optimizer, p)}
        if at_once:
            descend_(self.optimizer, at_once, self.estimate, self.clip)
            self.optimizer.step()  # without gradients it moves nothing, but its hooks are called
        for bucket in self._gradients({name: p for name, p in self.parameters.items() if name not in at_once}):
            for name in bucket:
                self.parameters[name].grad = bucket[name] if self.clip == 1.0 else bucket[name].mul_(self.clip)
            self.optimizer.step()
            for name in bucket:
                self.parameters[name].grad = None
            bucket.clear()  # before the next are made
        self.estimate = None

    def _gradients(self, parameters: Parameters) -> Iterator[dict[str, Tensor]]:
        """ĝ of neighbouring parameters, which together are no larger than the largest one, or small."""
        assert self.estimate is not None, "`hold` an estimate before `step`."
        numels = [p.numel() for p in parameters.values()]
        separate = f"{type(self.optimizer).__module__}.".startswith(SEPARATE)
        room = max([CHUNK, *numels]) if separate else sum(numels)
        for bucket in together(parameters, Tensor.numel, room):
            yield gradients(self.estimate, bucket)

    # accelerate and the schedulers replace these lists and dicts, so they are looked up, never kept
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        own = {name: vars(self)[name] for name in OWN}
        return self.optimizer.state_dict() | {"zoo": own | self.settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state; an optimizer's own, from training with gradients, will do."""
        inner = dict(state_dict)
        saved = inner.pop("zoo", {})
        vars(self).update({name: saved[name] for name in OWN if name in saved})
        for name, now in self.settings.items():
            then = saved.get(name, now)
            if now != then:
                logger.warning(
                    f"`{name}` is {now!r} now and was {then!r} when the checkpoint was made: the steps from here on "
                    f"are not those of an uninterrupted run. Set `{name}`={then!r} if that is what you want."
                )
        self.optimizer.load_state_dict(inner)
