"""A model before its training: what would harm probes is switched off, and what they cannot displace is refused."""

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedModel

from .carry import check_state
from .config import FLOAT16
from .loading import bare_model
from .noise import check_names
from .perturbation import check_contiguous, share_moved


logger = logging.getLogger(__name__)

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}
CHECKPOINTING = {"gradient_checkpointing", "activation_checkpointing"}  # the second is the newer name of the first
UNCUT = 2**31 - 1  # tokens; longer than any sequence


def prepare_(model: Any, args: Any) -> None:
    """Tag the model, and switch off, with a log line each, what is of no use or harm to probes."""
    # the flag that transformers sets on each module it checkpoints; its methods change names with the version
    checkpointed = [module for module in model.modules() if vars(module).get("gradient_checkpointing")]
    for module in checkpointed:
        module.gradient_checkpointing = False
    switches = CHECKPOINTING & vars(args).keys()
    if checkpointed or any(vars(args)[switch] for switch in switches):
        vars(args).update(dict.fromkeys(switches, False))
        logger.warning("Gradient checkpointing is switched off: no activations are kept for a backward pass.")
    if args.smoothing_radius is None:
        # ranks may have started from other weights; the first one's are taken, and so is its radius
        radius = default_radius(p for p in model.parameters() if p.requires_grad)
        (args.smoothing_radius,) = broadcast_object_list([radius])
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.add_model_tags(["zoo_hf", "zeroth-order"])
        if type(module).__name__ == "RwkvModel" and module.config.rescale_every:
            # it would rewrite its weights in the midst of a probe, where the mode changes from training to inference
            module.train()._rescale_layers()
            module.config.rescale_every = 0
            logger.warning("RWKV: `rescale_every` is set to 0, as it rewrites the weights. Set it again for float16.")
        if type(module).__name__ == "xLSTMModel" and module.config.max_inference_chunksize < UNCUT:
            # in inference mode, as a probe is, it would hand the state of a longer sequence on in bfloat16
            module.config.max_inference_chunksize = UNCUT
            logger.warning("xLSTM: `max_inference_chunksize` is raised, as each cut rounds the state to bfloat16.")


def default_radius(weights: Iterable[Tensor]) -> float:
    """The power of two next to √(mean θ²)/64, for which bfloat16 still has room; 2⁻⁷ where all are zero, or none."""
    total, count = 0.0, 0
    for weight in weights:
        total, count = total + torch.linalg.vector_norm(weight.detach().float()).item() ** 2, count + weight.numel()
    return 2.0 ** round(math.log2(math.sqrt(total / count) / 64)) if total else 2.0**-7


def check_weights(trainer: Any) -> None:
    """Raises: ValueError when no weight is trainable, one cannot be displaced, or most would not feel it."""
    weights = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    if not weights:
        raise ValueError("No parameter has `requires_grad=True`: unfreeze some, or add a PEFT adapter.")
    check_names(list(weights))
    if trainer.args.carry_state:
        check_state(bare_model(trainer))
    if trainer.args.device.type == "cpu" and any(p.dtype == torch.float16 for p in trainer.model.parameters()):
        raise ValueError(FLOAT16)
    check_contiguous(weights)
    if trainer.accelerator.mixed_precision not in COMPUTE_DTYPES:
        raise ValueError(
            f"mixed_precision={trainer.accelerator.mixed_precision!r} of the accelerate configuration would round "
            "displacements away: use 'bf16' or 'no'."
        )
    radius, precision = trainer.args.smoothing_radius, COMPUTE_DTYPES[trainer.accelerator.mixed_precision]
    moved = share_moved(weights, radius, precision)
    dtypes = ", ".join(sorted({str(precision or p.dtype) for p in weights.values()}))
    if moved < 0.5:
        raise ValueError(
            f"`smoothing_radius`={radius} moves only {moved:.0%} of the weights in {dtypes}: "
            "raise it, or compute in a wider dtype."
        )
    if moved < 0.95:
        logger.warning(
            f"smoothing_radius={radius} leaves {1 - moved:.0%} of the weights in {dtypes} where they are: raise it."
        )
