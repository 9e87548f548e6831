"""The recurrent state that a row of a batch hands on to the same row of the next."""

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import Trainer


READ = ("input_ids", "inputs_embeds", "attention_mask", "starts", "state")  # what a state depends on


def check_state(model: nn.Module) -> None:
    """Raises: ValueError when the model's forward pass takes no `state`."""
    if "state" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"`carry_state`=True needs a model whose forward pass takes and returns `state`, and "
            f"{type(model).__name__} does not: take one of zoo_hf's models, or set `carry_state=False`."
        )


def with_state(inputs: dict[str, Any], state: Tensor | None) -> dict[str, Any]:
    """The batch, to be read from where the batch before ended: every member starts from this same state.

    Raises:
        ValueError: the batch has another number of rows than the one before.
    """
    if state is None:
        return inputs
    rows = len(next(iter(inputs.values())))
    if rows != len(state):
        raise ValueError(
            f"The carried state has {len(state)} rows and the batch {rows}: rows must go on from batch to batch. Make "
            "the data with `zoo_hf.tasks.text_streams` and this `batch_size`, or set `dataloader_drop_last=True`."
        )
    return inputs | {"state": state}


def state_after(trainer: Trainer, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The state after a batch, at the model's present weights: one forward pass, of which no scores are kept."""
    read = {name: inputs[name] for name in READ if name in inputs}
    with trainer.compute_loss_context_manager():
        return model(**read, use_cache=True, logits_to_keep=1).state
