"""A finished run → its model card."""

import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel
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
    model = _unwrapped(trainer)
    network: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    pipeline, _, is_language_model = task_of(network)
    metrics = final_metrics(trainer, with_perplexity=is_language_model)
    base = finetuned_from or _base_model(model, network)
    name = model_name or Path(_repository(trainer)).name
    data = ModelCardData(
        language=_listed(language) or None,
        license=license,
        library_name="transformers" if network is model else "peft",
        pipeline_tag=next(iter(_listed(tasks)), pipeline),
        tags=_tags(network, tags),
        base_model=base,
        datasets=_listed(dataset_tags) or None,
        model_name=name,
        eval_results=_eval_results(metrics, pipeline, dataset_tags, dataset, dataset_args) or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        summary=_summary(network, base, dataset),
        plot="loss.png" if Path(str(trainer.args.output_dir), "loss.png").exists() else None,
        dataset=", ".join(_listed(dataset)) or "the evaluation set",
        results=[(metric, f"{value:.4g}") for metric, value in metrics.items()],
        loss_unit=", in nats a token" if is_language_model else "",
        loading=loading_code(trainer, network),
        **training_procedure(trainer, model),
    )


def task_of(model: PreTrainedModel) -> tuple[str | None, str, bool]:
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


def training_procedure(trainer: Trainer, model: nn.Module) -> dict[str, Any]:
    """What the card says of how `model` was trained, as variables of the template; `procedure` is its table."""
    args: Any = trainer.args
    n = args.num_directions
    d = sum(p.numel() for p in model.parameters() if p.requires_grad)
    estimator, formula = ESTIMATES[args.estimator]
    history, steps = trainer.state.log_history, f"{trainer.state.global_step:,}"
    warmup = args.get_warmup_steps(trainer.state.max_steps)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    rows = [
        ("weights", f"{sum(p.numel() for p in model.parameters()):,}, of which {d:,} trained"),
        ("estimator", f"{estimator}, {n} directions, {args.distribution}"),
        ("smoothing radius ε", f"{args.smoothing_radius:g}"),
        ("optimizer", f"{args.optim.value}, learning rate {args.learning_rate:g}, weight decay {args.weight_decay:g}"),
        ("schedule", f"{args.lr_scheduler_type.value}, {warmup} steps of warm-up"),
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


def loading_code(trainer: Trainer, network: PreTrainedModel) -> str:
    """Python lines that load the trained model, and its tokenizer if there is one."""
    adapted, place = isinstance(_unwrapped(trainer), PeftModel), _repository(trainer)
    auto = f"Auto{'Peft' if adapted else ''}Model{task_of(network)[1]}"
    names, calls = [auto], [f'model = {auto}.from_pretrained("{place}")']
    if trainer.processing_class is not None:
        names.append("AutoTokenizer")
        calls.append(f'tokenizer = AutoTokenizer.from_pretrained("{place}")')
    imports = [f"from transformers import {', '.join(names)}"]
    if adapted:
        imports = [f"from peft import {auto}", *(f"from transformers import {name}" for name in names[1:])]
    if _is_ours(network):
        imports.insert(0, "import zoo_hf  # knows this kind of model; without it, add trust_remote_code=True below")
    return "\n".join([*imports, "", *calls])


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


def _repository(trainer: Trainer) -> str:
    return str(trainer.hub_model_id or trainer.args.hub_model_id or trainer.args.output_dir)


def _is_ours(network: PreTrainedModel) -> bool:
    return type(network).__module__.startswith("zoo_hf.")


def _base_model(model: nn.Module, network: PreTrainedModel) -> str | None:
    """Hub name of the model that was fine-tuned. A folder of this machine means nothing to the card's reader."""
    adapted = model.active_peft_config.base_model_name_or_path if isinstance(model, PeftModel) else None
    base = adapted or network.config._name_or_path
    return base if base and not Path(base).exists() else None


def _summary(network: PreTrainedModel, base: str | None, dataset: Names) -> str:
    origin = f"fine-tuned from [{base}](https://huggingface.co/{base})" if base else "trained from scratch"
    text = f" on {', '.join(_listed(dataset))}" if dataset else ""
    kind = f"`{type(network).__name__}` (model type `{network.config.model_type}`)"
    return f"{kind}, {origin}{text} without backpropagation."


def _tags(network: PreTrainedModel, tags: Names) -> list[str]:
    family = ["rnn"] if _is_ours(network) else []
    return sorted({"zoo_hf", "zeroth-order", *family, *(network.model_tags or []), *_listed(tags)})


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
