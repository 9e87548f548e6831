"""A finished run → its model card."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model  # peft itself takes a second to import
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel, Trainer

from .callbacks import PLOT_NAME
from .loading import bare_model, is_ours, library_of, loading_code, replaying, repository_of, task_of
from .procedure import training_procedure, unwrapped


TEMPLATE = Path(__file__).with_name("model_card.md")

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
    trajectory_of: str | None = None,
) -> ModelCard:
    """The card of what `trainer` trained, from its arguments, its log and its model. Nothing is looked up online.

    Args:
        trainer: its arguments have the fields of `ZOOArguments`. A `loss.png` in its output directory is shown.
        trajectory_of: the repository, where it has the run's trajectory and no weights.
        others: as in `Trainer.create_model_card`; no licence is claimed unless one is given.
    """
    network = bare_model(trainer)
    pipeline, _, is_language_model = task_of(network)
    metrics = final_metrics(trainer, with_perplexity=is_language_model)
    data = ModelCardData(
        language=_listed(language) or None,
        license=license,
        library_name="zoo_hf" if trajectory_of else library_of(trainer),
        pipeline_tag=next(iter(_listed(tasks)), pipeline),
        tags=_tags(network, [*_listed(tags), *(["trajectory"] if trajectory_of else [])]),
        base_model=finetuned_from or _base_model(trainer),
        datasets=_listed(dataset_tags) or None,
    )
    name = model_name or Path(trajectory_of or repository_of(trainer)).name
    data.eval_results = _eval_results(metrics, pipeline, dataset_tags, dataset, dataset_args) or None
    data.model_name = name if data.eval_results else None  # the index of its results has it
    variables = content(trainer, data, metrics, dataset) | replaying(trainer, trajectory_of) | {"name": name}
    return ModelCard.from_template(data, template_path=str(TEMPLATE), **variables)


def content(trainer: Trainer, data: ModelCardData, metrics: dict[str, float], dataset: Names) -> dict[str, Any]:
    """The variables of the template."""
    network = bare_model(trainer)
    return {
        "summary": _summary(network, data.base_model, dataset),
        "plot": PLOT_NAME if Path(str(trainer.args.output_dir), PLOT_NAME).exists() else None,
        "dataset": ", ".join(_listed(dataset)) or "the evaluation set",
        "results": [(metric, f"{value:.4g}") for metric, value in metrics.items()],
        "loss_unit": ", in nats a token" if task_of(network)[2] else "",
        "loading": loading_code(trainer),
        **training_procedure(trainer),
    }


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


def _base_model(trainer: Trainer) -> str | None:
    """Hub name of the model that was fine-tuned. A folder of this machine means nothing to the card's reader."""
    model: Any = unwrapped(trainer)
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
    family = ["rnn"] if is_ours(network) else []
    own = network.model_tags if isinstance(network, PreTrainedModel) else None
    return sorted({"zoo_hf", "zeroth-order", *family, *(own or []), *_listed(tags)})


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
