"""How a model was trained, in the words and figures that its card says it with."""

import math
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .own_objective import called


ESTIMATES = {
    "central": ("central differences (CD-RGE)", "ĝ = 1/n Σᵢ [L(θ + εzᵢ) − L(θ − εzᵢ)]/2ε · zᵢ"),
    "forward": ("forward differences (RGE)", "ĝ = 1/n Σᵢ [L(θ + εzᵢ) − L(θ)]/ε · zᵢ"),
}


def training_procedure(trainer: Trainer) -> dict[str, Any]:
    """What the card says of how the model was trained, as variables of the template; `procedure` is its table."""
    args: Any = trainer.args
    model = unwrapped(trainer)
    n = args.num_directions
    d = sum(p.numel() for p in model.parameters() if p.requires_grad)
    estimator, formula = ESTIMATES[args.estimator]
    history, steps = trainer.state.log_history, f"{trainer.state.global_step:,}"
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    rows = [
        ("command", command(sys.argv)),
        ("weights", f"{sum(p.numel() for p in model.parameters()):,}, of which {d:,} trained"),
        ("estimator", f"{estimator}, {n} directions, {_distribution(args)}"),
        ("objective", _objective(trainer)),
        ("members", _members(trainer)),
        ("smoothing radius ε", f"{args.smoothing_radius:g}"),
        ("optimizer", _optimizer(trainer)),
        ("schedule", _schedule(trainer)),
        ("examples a step", f"{trainer.get_total_train_batch_size(args):,}"),
        ("steps", steps),
        ("forward passes", _last(history, "forward_passes", "{:,.0f}")),
        ("forward passes a second", _median(history, "forward_passes_per_second")),
        ("tokens", _last(history, "tokens", "{:,.0f}")),
        ("time", _last(history, "train_runtime", "{:,.0f} s, evaluation included")),
        ("peak memory", _last(history, "peak_memory_bytes", "{:,.0f} MB of " + memory_of(), 1e-6)),
        ("precision", "bfloat16 autocast" if args.bf16 else "float16 autocast" if args.fp16 else ", ".join(dtypes)),
        ("processes", f"{args.world_size}"),
        ("seed", f"{args.seed}"),
        ("hardware", hardware()),
        ("software", ", ".join(f"{name} {number}" for name, number in versions().items())),
    ]
    return {
        "procedure": [(name, value) for name, value in rows if value],
        "formula": formula,
        "steps": steps,
        "directions": n,
        "trained": f"{d:,}",
        "cosine": f"{math.sqrt(n / (n + d - 1)):.2g}",
    }


def unwrapped(trainer: Trainer) -> nn.Module:
    """The model, without a wrapper of accelerate's or of the compiler's around it."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)


def command(arguments: list[str]) -> str:
    """What was typed to run `zoo-hf` or a script in the present folder, without tokens; empty for anything else."""
    script = Path(arguments[0]).resolve()
    if script.stem == "zoo-hf":
        typed = ["zoo-hf"]
    elif script.suffix == ".py" and Path.cwd() in script.parents:
        typed = ["python", str(script.relative_to(Path.cwd()))]
    else:
        return ""
    shown, hidden = [], False
    for argument in arguments[1:]:
        name, _, value = argument.partition("=")
        secret = name.startswith("-") and name.endswith("token")
        shown.append("TOKEN" if hidden else f"{name}=TOKEN" if secret and value else argument)
        hidden = secret and not value
    return f"`{shlex.join([*typed, *shown])}`"


def hardware() -> str:
    """The accelerators of this machine, or else its processor, with their number."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.processor() or platform.machine()
    return f"{processor}, {len(models) or 1} cores, of which {torch.get_num_threads()} used"


def peak_memory() -> int:
    """Bytes that this process has held at most: of its GPUs by torch's count, else resident; 0 where none tells."""
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    if sys.platform == "win32":
        return 0
    import resource  # which Windows does not have

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def memory_of() -> str:
    return "GPU memory" if torch.cuda.is_available() else "the process, libraries included"


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("zoo_hf", "torch", "transformers", "accelerate", "datasets", "peft")
    return {"Python": platform.python_version()} | {name: version(name) for name in packages}


def _objective(trainer: Any) -> str:
    return "" if trainer.own_objective is None else f"`{called(trainer.own_objective.function)}`, minimised"


def _optimizer(trainer: Any) -> str:
    """What the arguments say, unless an optimizer was given to the trainer."""
    args, update = trainer.args, trainer.update
    name, rate, decay = args.optim.value, args.learning_rate, args.weight_decay
    if update and (trainer.given_optimizers[0] or trainer.optimizer_cls_and_kwargs):
        name = type(update.optimizer).__name__
        first = update.param_groups[0]
        rate = first.get("initial_lr", first["lr"])  # most schedules keep where they started
        decay = max(group.get("weight_decay", 0) for group in update.param_groups)
    return f"{name}, learning rate {float(rate):g}, weight decay {float(decay):g}"


def _distribution(args: Any) -> str:
    rank = f" of rank {args.direction_rank}" if args.distribution.startswith("low_rank") else ""
    return f"{args.distribution}{rank}"


def _members(trainer: Any) -> str:
    """How they were evaluated."""
    sizes = sorted(set(trainer.update.population.values())) if trainer.update else []
    if not sizes or sizes[-1] == 1:
        return "one at a time"
    return f"{'–'.join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))} in a forward pass"


def _schedule(trainer: Any) -> str:
    args, given = trainer.args, trainer.given_optimizers[1]
    if given:
        return type(given).__name__
    return f"{args.lr_scheduler_type.value}, {args.get_warmup_steps(trainer.state.max_steps)} steps of warm-up"


def _last(history: list[dict[str, Any]], key: str, layout: str, scale: float = 1) -> str:
    values = [entry[key] for entry in history if key in entry]
    return layout.format(values[-1] * scale) if values else "not logged"


def _median(history: list[dict[str, Any]], key: str) -> str:
    values = [entry[key] for entry in history if key in entry]
    return f"{median(values):,.0f}" if values else "not logged"
