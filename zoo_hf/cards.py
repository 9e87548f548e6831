"""A finished run → its model card."""

import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate.utils import is_peft_model  # peft itself takes a second to import
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel, Trainer


TEMPLATE = Path(__file__).with_name("model_card.md")

# how the name of a model's class ends → its pipeline, its Auto class, whether its loss is in nats a token
TASKS = {
    "ForCausalLM": ("text-generation", "ForCausalLM", True),
    "LMHeadModel": ("text-generation", "ForCausalLM", True),
    "ForConditionalGeneration": (None, "ForSeq2SeqLM", True),
    "ForSequenceClassification": ("text-classification", "ForSequenceClassification", False),
    "ForTokenClassification": ("token-classification", "ForTokenClassification", False),
    "ForQuestionAnswering": ("question-answering", "ForQuestionAnswering", False),
}
OTHER_TASK = (None, "", False)

ESTIMATES = {
    "central": ("central differences (CD-RGE)", "ĝ = 1/n Σᵢ [L(θ + εzᵢ) − L(θ − εzᵢ)]/2ε · zᵢ"),
    "forward": ("forward differences (RGE)", "ĝ = 1/n Σᵢ [L(θ + εzᵢ) − L(θ)]/ε · zᵢ"),
}

# what an evaluation logs beside its metrics
BOOKKEEPING = ("_runtime", "_per_second", "_preparation_time")

Names = str | Sequence[str] | None


def model_card(
    trainer: Trainer,
    *,
    language: Names = None,
    license: str | None = None,
    tags: Names = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: Names = None,
    dataset_tags: Names = None,
    dataset: Names = None,
    dataset_args: Names = None,
) -> ModelCard:
    """The card of what `trainer` trained, from its arguments, its log and its model. Nothing is looked up online.

    Args:
        trainer: its arguments have the fields of `ZOOArguments`. A `loss.png` in its output directory is shown.
        others: as in `Trainer.create_model_card`; no licence is claimed unless one is given.
    """
    network = bare_model(trainer)
    pipeline, _, is_language_model = task_of(network)
    metrics = final_metrics(trainer, with_perplexity=is_language_model)
    data = ModelCardData(
        language=_listed(language) or None,
        license=license,
        library_name=_library(trainer),
        pipeline_tag=next(iter(_listed(tasks)), pipeline),
        tags=_tags(network, tags),
        base_model=finetuned_from or _base_model(trainer),
        datasets=_listed(dataset_tags) or None,
        model_name=model_name or Path(_repository(trainer)).name,
        eval_results=_eval_results(metrics, pipeline, dataset_tags, dataset, dataset_args) or None,
    )
    return ModelCard.from_template(data, template_path=str(TEMPLATE), **content(trainer, data, metrics, dataset))


def content(trainer: Trainer, data: ModelCardData, metrics: dict[str, float], dataset: Names) -> dict[str, Any]:
    """The variables of the template."""
    network = bare_model(trainer)
    return {
        "name": data.model_name,
        "summary": _summary(network, data.base_model, dataset),
        "plot": "loss.png" if Path(str(trainer.args.output_dir), "loss.png").exists() else None,
        "dataset": ", ".join(_listed(dataset)) or "the evaluation set",
        "results": [(metric, f"{value:.4g}") for metric, value in metrics.items()],
        "loss_unit": ", in nats a token" if task_of(network)[2] else "",
        "loading": loading_code(trainer),
        **training_procedure(trainer),
    }


def task_of(model: nn.Module) -> tuple[str | None, str, bool]:
    """(pipeline, ending of the Auto class, whether the loss is in nats a token), by the name of the model's class."""
    name = type(model).__name__
    return next((task for ending, task in TASKS.items() if name.endswith(ending)), OTHER_TASK)


def final_metrics(trainer: Trainer, *, with_perplexity: bool) -> dict[str, float]:
    """Evaluation metrics of the weights that the run ends with, without the prefix `eval_`; perplexity is e^loss."""
    state = trainer.state
    entries = [entry for entry in state.log_history if any(key.startswith("eval_") for key in entry)]
    if trainer.args.load_best_model_at_end and state.best_global_step is not None:
        entries = [entry for entry in entries if entry["step"] == state.best_global_step] or entries
    last = [entry for entry in entries if entry["step"] == entries[-1]["step"]]  # one for each evaluation set
    metrics = {
        key.removeprefix("eval_"): float(value)
        for entry in last
        for key, value in entry.items()
        if key.startswith("eval_") and not key.endswith(BOOKKEEPING) and isinstance(value, (int, float))
    }
    if with_perplexity and "loss" in metrics:
        metrics["perplexity"] = math.exp(min(metrics["loss"], 700.0))  # e^710 is no float
    return metrics


def training_procedure(trainer: Trainer) -> dict[str, Any]:
    """What the card says of how the model was trained, as variables of the template; `procedure` is its table."""
    args: Any = trainer.args
    model = _unwrapped(trainer)
    n = args.num_directions
    d = sum(p.numel() for p in model.parameters() if p.requires_grad)
    estimator, formula = ESTIMATES[args.estimator]
    history, steps = trainer.state.log_history, f"{trainer.state.global_step:,}"
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    rows = [
        ("weights", f"{sum(p.numel() for p in model.parameters()):,}, of which {d:,} trained"),
        ("estimator", f"{estimator}, {n} directions, {_distribution(args)}"),
        ("members", _members(trainer)),
        ("smoothing radius ε", f"{args.smoothing_radius:g}"),
        ("optimizer", _optimizer(trainer)),
        ("schedule", _schedule(trainer)),
        ("examples a step", f"{trainer.get_total_train_batch_size(args):,}"),
        ("steps", steps),
        ("forward passes", _last(history, "forward_passes", "{:,.0f}")),
        ("forward passes a second", _median(history, "forward_passes_per_second")),
        ("time", _last(history, "train_runtime", "{:,.0f} s, evaluation included")),
        ("precision", "bfloat16 autocast" if args.bf16 else "float16 autocast" if args.fp16 else ", ".join(dtypes)),
        ("processes", f"{args.world_size}"),
        ("seed", f"{args.seed}"),
        ("hardware", hardware()),
        ("software", ", ".join(f"{name} {number}" for name, number in versions().items())),
    ]
    return {
        "procedure": rows,
        "formula": formula,
        "steps": steps,
        "directions": n,
        "trained": f"{d:,}",
        "cosine": f"{math.sqrt(n / (n + d - 1)):.2g}",
    }


def loading_code(trainer: Trainer) -> str:
    """Python lines that load the trained model, and its tokenizer if there is one."""
    network, library, place = bare_model(trainer), _library(trainer), _repository(trainer)
    if library is None:
        return _loading_code_of_a_module(trainer)
    auto = f"Auto{'Peft' if library == 'peft' else ''}Model{task_of(network)[1]}"
    names, calls = [auto], [f'model = {auto}.from_pretrained("{place}")']
    if trainer.processing_class is not None:
        names.append("AutoTokenizer")
        calls.append(f'tokenizer = AutoTokenizer.from_pretrained("{place}")')
    imports = [f"from transformers import {', '.join(names)}"]
    if library == "peft":
        imports = [f"from peft import {auto}", *(f"from transformers import {name}" for name in names[1:])]
    if _is_ours(network):
        imports.insert(0, "import zoo_hf  # knows this kind of model; without it, add trust_remote_code=True below")
    return "\n".join([*imports, "", *calls])


def _loading_code_of_a_module(trainer: Trainer) -> str:
    imports, weights = ["from safetensors.torch import load_model"], f'"{trainer.args.output_dir}/model.safetensors"'
    if _hub_id(trainer):
        imports.insert(0, "from huggingface_hub import hf_hub_download")
        weights = f'hf_hub_download("{_hub_id(trainer)}", "model.safetensors")'
    kind = type(bare_model(trainer)).__name__
    made = f"model = {kind}(...)  # a class of its own: take it from where it was trained"
    return "\n".join([*imports, "", made, f"load_model(model, {weights})"])


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


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("zoo_hf", "torch", "transformers", "accelerate", "datasets", "peft")
    return {"Python": platform.python_version()} | {name: version(name) for name in packages}


def _unwrapped(trainer: Trainer) -> nn.Module:
    return trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)


def bare_model(trainer: Trainer) -> nn.Module:
    """The model, without an adapter or a wrapper around it."""
    model: Any = _unwrapped(trainer)
    return model.get_base_model() if is_peft_model(model) else model


def _library(trainer: Trainer) -> str | None:
    """The library whose `from_pretrained` loads what was saved."""
    if is_peft_model(_unwrapped(trainer)):
        return "peft"
    return "transformers" if isinstance(bare_model(trainer), PreTrainedModel) else None


def _repository(trainer: Trainer) -> str:
    return str(_hub_id(trainer) or trainer.args.output_dir)


def _hub_id(trainer: Trainer) -> str | None:
    return trainer.hub_model_id or trainer.args.hub_model_id


def _is_ours(network: nn.Module) -> bool:
    return type(network).__module__.startswith("zoo_hf.")


def _base_model(trainer: Trainer) -> str | None:
    """Hub name of the model that was fine-tuned. A folder of this machine means nothing to the card's reader."""
    model: Any = _unwrapped(trainer)
    network = bare_model(trainer)
    adapted = model.active_peft_config.base_model_name_or_path if is_peft_model(model) else None
    base = adapted or (network.config._name_or_path if isinstance(network, PreTrainedModel) else None)
    return base if base and not Path(base).exists() else None


def _summary(network: nn.Module, base: Names, dataset: Names) -> str:
    kind = f"`{type(network).__name__}`"
    origin = f"fine-tuned from [{base}](https://huggingface.co/{base})" if base else "trained from scratch"
    if isinstance(network, PreTrainedModel):
        kind += f" (model type `{network.config.model_type}`)"
    elif not base:
        origin = "trained"  # its weights may have come from anywhere
    text = f" on {', '.join(_listed(dataset))}" if dataset else ""
    return f"{kind}, {origin}{text} without backpropagation."


def _tags(network: nn.Module, tags: Names) -> list[str]:
    family = ["rnn"] if _is_ours(network) else []
    own = network.model_tags if isinstance(network, PreTrainedModel) else None
    return sorted({"zoo_hf", "zeroth-order", *family, *(own or []), *_listed(tags)})


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


def _eval_results(
    metrics: dict[str, float], task: str | None, dataset_tags: Names, dataset: Names, dataset_args: Names
) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=task or "other",
            dataset_type=next(iter(_listed(dataset_tags)), "unknown"),
            dataset_name=", ".join(_listed(dataset)) or "evaluation set",
            dataset_config=", ".join(_listed(dataset_args)) or None,
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in metrics.items()
    ]


def _listed(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _last(history: list[dict[str, Any]], key: str, layout: str) -> str:
    values = [entry[key] for entry in history if key in entry]
    return layout.format(values[-1]) if values else "not logged"


def _median(history: list[dict[str, Any]], key: str) -> str:
    values = [entry[key] for entry in history if key in entry]
    return f"{median(values):,.0f}" if values else "not logged"
