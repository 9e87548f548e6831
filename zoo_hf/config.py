"""ZOOConfig: the arguments of `transformers.TrainingArguments` and the few that a zero-order step needs."""

import logging
import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import TrainingArguments

from .update import check_optimizer


logger = logging.getLogger(__name__)

CHOICES = {
    "estimator": ("central", "forward"),
    "distribution": ("rademacher", "gaussian", "low_rank", "low_rank_gaussian"),
    "probes": ("auto", "serial", "population"),
    "data": ("shared", "split"),
    "normalize": ("none", "loss_std"),
}


@dataclass
class ZOOArguments:
    """Arguments of a zero-order step, to be mixed into any class of training arguments.

    `class C(ZOOArguments, SFTConfig)` makes the arguments of a zero-order SFTTrainer. Two defaults differ from those
    of `TrainingArguments`: `learning_rate` (5e-5 there) and `max_grad_norm` (1.0 there, which would shorten every step
    to one length, as an estimate is about √(d/n) times longer than the gradient).
    """

    num_directions: int = field(
        default=32,
        metadata={"help": "Random directions an update; each costs two forward passes (central) or one (forward)."},
    )
    smoothing_radius: float | None = field(
        default=None,
        metadata={
            "help": "Length ε of a displacement in each weight, in units of the weights; unset: the power of two next "
            "to a 64th of the trained weights' root mean square."
        },
    )
    estimator: Literal["central", "forward"] = field(
        default="central",
        metadata={"help": "central: [L(θ+εz) − L(θ−εz)]/2ε, 2n forward passes; forward: [L(θ+εz) − L(θ)]/ε, n + 1."},
    )
    distribution: Literal["rademacher", "gaussian", "low_rank", "low_rank_gaussian"] = field(
        default="rademacher",
        metadata={
            "help": "Entries of a direction: ±1, at one random bit a weight, or standard normal, much slower. "
            "low_rank: A Bᵀ/√r on matrices, with entries ±1 in A and B, or normal."
        },
    )
    direction_rank: int = field(default=1, metadata={"help": "Rank r of a direction on a matrix, where it is low."})
    probes: Literal["auto", "serial", "population"] = field(
        default="auto",
        metadata={
            "help": "Evaluate members one at a time, or many in one forward pass, which is faster for small models; "
            "auto: what pays."
        },
    )
    members_per_forward: int | None = field(
        default=None,
        metadata={
            "help": "Members of a population in a forward pass; unset: as many as add at most the weights' size, or "
            "64 MB, to the memory of inference."
        },
    )
    dropout: bool = field(
        default=False,
        metadata={"help": "Probe in training mode, all members of an update under the same dropout masks."},
    )
    carry_state: bool = field(
        default=False,
        metadata={
            "help": "Start each row of a batch from the recurrent state that the row had after the batch before, as "
            "data of `zoo_hf.tasks.text_streams` go on. Costs one forward pass a batch."
        },
    )
    data: Literal["shared", "split"] = field(
        default="shared",
        metadata={
            "help": "shared: all members see the whole batch. split: every pair sees its own share of it, one of "
            "`num_directions`, for a larger batch at the same cost; members are then evaluated one at a time."
        },
    )
    normalize: Literal["none", "loss_std"] = field(
        default="none",
        metadata={
            "help": "loss_std: divide the estimate by σ/ε, with σ the standard deviation of the step's losses, so "
            "that the learning rate does not depend on the loss's scale."
        },
    )
    rank_check_steps: int = field(
        default=100,
        metadata={
            "help": "Compare the weights of several processes after every so many updates, and before every "
            "checkpoint; each reads the weights once. 0: only before checkpoints."
        },
    )
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Initial learning rate of the optimizer; unset: 0.02 at 32 directions, in proportion to √n, or to "
            "n for optim='sgd'. A guess for new models: `find_learning_rate` measures, and pretrained ones want less."
        },
    )
    max_grad_norm: float = field(
        default=0.0,
        metadata={"help": "Clip the estimate to this norm; costs one more pass over the directions. 0 is off."},
    )

    def __post_init__(self) -> None:
        refuse_sharding(self)  # first: transformers would ask for its packages
        if self.learning_rate is None:
            self.learning_rate = default_learning_rate(self.num_directions, str(self.optim))  # type: ignore[attr-defined]
        super().__post_init__()  # type: ignore[misc]  # of the class of training arguments mixed in
        check(self)


@dataclass
class ZOOConfig(ZOOArguments, TrainingArguments):  # type: ignore[misc]  # `learning_rate` may be unset
    """`transformers.TrainingArguments` and `ZOOArguments` in one; see there."""


def check(args: Any) -> None:
    """Refuse values that make no sense.

    Raises:
        ValueError: names the field, the value and what is allowed.
    """
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"`seed` must be in [0, 2**32), got {args.seed}.")
    if args.num_directions < 1:
        raise ValueError(f"`num_directions` must be at least 1, got {args.num_directions}.")
    if args.smoothing_radius is not None and not 0 < args.smoothing_radius < math.inf:
        raise ValueError(f"`smoothing_radius` must be positive and finite, got {args.smoothing_radius}.")
    if args.max_grad_norm < 0:
        raise ValueError(f"`max_grad_norm` must not be negative, got {args.max_grad_norm}; 0 is off.")
    if args.rank_check_steps < 0:
        raise ValueError(f"`rank_check_steps` must not be negative, got {args.rank_check_steps}; 0 is off.")
    if args.data == "split":
        check_split(args)
    for name in ("direction_rank", "members_per_forward"):
        number = getattr(args, name)
        if number is not None and number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number}.")
    for name, choices in CHOICES.items():
        if getattr(args, name) not in choices:
            raise ValueError(f"`{name}` must be one of {choices}, got {getattr(args, name)!r}.")


def default_learning_rate(directions: int, optimizer: str) -> float:
    """0.02 at n = 32, for new models; what a step may cost in curvature goes with the square of its length.

    The square of ĝ's noise is in proportion to 1/n, and so the rate of plain descent to n. A step of Adam is as long
    for any n, and what of it points along the gradient is in proportion to √n, and so is its rate.
    """
    more = max(1, directions) / 32
    return 2e-2 * (more if optimizer.rpartition(".")[2].lower() == "sgd" else math.sqrt(more))


def check_split(args: Any) -> None:
    """Raises: ValueError when pairs cannot have a share of the batch each."""
    for name, value, remedy in (
        ("estimator", "forward", "'central', as L(θ) is of the whole batch"),
        ("probes", "population", "'serial', as members of a population see the same batch"),
        ("carry_state", True, "False, as a state goes on from the whole batch before"),
        ("normalize", "loss_std", "'none', as losses of different shares differ"),
    ):
        if getattr(args, name) == value:
            raise ValueError(f"`data`='split' and `{name}`={value!r} exclude each other: use `{name}`={remedy}.")


def complete_(args: TrainingArguments) -> None:
    """Give plain training arguments the zero-order fields they lack, at their defaults, in place.

    The learning rate stays; a `max_grad_norm` of 1.0, the default of `TrainingArguments`, becomes 0.
    """
    missing = [f for f in fields(ZOOArguments) if f.name not in vars(args)]
    if not missing:  # ours, or completed before: what a search has set since then stays
        return
    for f in missing:
        setattr(args, f.name, f.default)
    if args.max_grad_norm == 1.0:
        args.max_grad_norm = 0.0
        logger.warning(
            "max_grad_norm: 1.0, the default of TrainingArguments, is taken as 0 (off); "
            "use ZOOConfig(max_grad_norm=1.0) to clip zero-order estimates."
        )


def settings(args: Any) -> dict[str, Any]:
    """What makes the steps of a run the steps they are, to be the same when it is resumed.

    The learning rate is not among them: a checkpoint brings its own.
    """
    names = ["seed", *(f.name for f in fields(ZOOArguments) if f.name not in ("learning_rate", "rank_check_steps"))]
    return {name: vars(args)[name] for name in names}


SHARDING = (
    "FSDP, DeepSpeed and other sharding split weights, gradients and optimizer state that a zero-order step needs "
    "whole or not at all. Remove `fsdp`, `deepspeed` and `parallelism_config`, also from the accelerate "
    "configuration: every process holds the whole model and evaluates its share of the members."
)
FLOAT16 = "float16 on a CPU is emulated, hundreds of times slower than float32: use bfloat16 or float32."


BACKWARD_ONLY = {"lomo": "Lomo", "adalomo": "AdaLomo", "layerwise": "LayerWiseDummyOptimizer"}  # of `optim`


def refuse_sharding(args: Any) -> None:
    """Raises: ValueError when the arguments ask for it."""
    if args.fsdp or args.deepspeed:
        raise ValueError(SHARDING)


def refuse(args: Any) -> None:
    """Raises: ValueError when the arguments ask for sharding, float16 on a CPU, or an optimizer that cannot work."""
    refuse_sharding(args)
    if args.fp16 and args.device.type == "cpu":
        raise ValueError(FLOAT16)
    check_optimizer(BACKWARD_ONLY.get(args.optim.value.split("_")[-1], ""))


def refuse_with_ranks(args: Any) -> None:
    """Raises: ValueError when the arguments would let ranks see different batches."""
    if args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            "`train_sampling_strategy`='batch_rebalance' gives every process other batches, and the members of a "
            "zero-order step need the same one: use 'random' or 'group_by_length'."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "`auto_find_batch_size` would change the batch of one process and not of the others: "
            "find it with one process, then set `per_device_train_batch_size`."
        )


def turn_off_(args: Any) -> None:
    """Switch off what only the stock way of several devices needs; say what has no effect."""
    args.average_tokens_across_devices = False  # ranks see the same tokens
    if args.carry_state and args.train_sampling_strategy != "sequential":
        args.train_sampling_strategy = "sequential"
        logger.warning("carry_state: `train_sampling_strategy` is set to 'sequential', as texts are read in order.")
    if args.n_gpu > 1:
        logger.warning(
            f"{args.n_gpu} GPUs in one process: the first is used. To use all of them, start with "
            f"`accelerate launch --num_processes {args.n_gpu} <script>`."
        )
        args._n_gpu = 1
    if args.neftune_noise_alpha is not None and not args.dropout:
        logger.warning("NEFTune is off, as probes run in inference mode: set `dropout=True` to train with its noise.")


def settle_(args: Any) -> None:
    """All of the above that needs nothing but the arguments, in place: complete, check, refuse, turn off.

    Raises:
        ValueError: see `check` and `refuse`.
    """
    complete_(args)
    check(args)
    refuse(args)
    turn_off_(args)
