"""A finished run → its model card."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model  # peft itself takes a second to import
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments

from .callbacks import PLOT_NAME
from .loading import Run, bare_model, loading_code, replaying, task_named, task_of
from .procedure import training_procedure, unwrapped


RUN_NAME = "zoo_run.json"  # in the output directory of a run
TEMPLATE = Path(__file__).with_name("model_card.md")

# what an evaluation logs beside its metrics
BOOKKEEPING = ("_runtime", "_per_second", "_preparation_time")

Names = str | Sequence[str] | None


def model_card(trainer: Trainer, **options: Any) -> ModelCard:
    """The card of what `trainer` trained, from its arguments, its log and its model. Nothing is looked up online.

    Args:
        trainer: its arguments have the fields of `ZOOArguments`.
        options: see `card_of`.
    """
    return card_of(run_of(trainer), str(trainer.args.output_dir), **options)


def card_of(
    run: Run,
    folder: str,
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
    """The card of a run.

    Args:
        folder: its output directory. A `loss.png` there is shown, and its trajectory described.
        trajectory_of: the repository, where it has the run's trajectory and no weights.
        others: as in `Trainer.create_model_card`; no licence is claimed unless one is given.
    """
    pipeline = task_named(run.kind)[0]
    data = ModelCardData(
        language=_listed(language) or None,
        license=license,
        library_name="zoo_hf" if trajectory_of else run.library,
        pipeline_tag=next(iter(_listed(tasks)), pipeline),
        tags=_tags(run, [*_listed(tags), *(["trajectory"] if trajectory_of else [])]),
        base_model=finetuned_from or run.base_model,
        datasets=_listed(dataset_tags) or None,
    )
    name = model_name or Path(trajectory_of or run.repository or folder).name
    data.eval_results = _eval_results(run.metrics, pipeline, dataset_tags, dataset, dataset_args) or None
    data.model_name = name if data.eval_results else None  # the index of its results has it
    variables = content(run, folder, data, dataset) | replaying(run, folder, trajectory_of) | {"name": name}
    return ModelCard.from_template(data, template_path=str(TEMPLATE), **variables)


def content(run: Run, folder: str, data: ModelCardData, dataset: Names) -> dict[str, Any]:
    """The variables of the template."""
    return {
        "summary": _summary(run, data.base_model, dataset),
        "plot": PLOT_NAME if Path(folder, PLOT_NAME).exists() else None,
        "dataset": ", ".join(_listed(dataset)) or "the evaluation set",
        "results": [(metric, f"{value:.4g}") for metric, value in run.metrics.items()],
        "loss_unit": ", in nats a token" if task_named(run.kind)[2] else "",
        "loading": loading_code(run, folder),
        **run.procedure,
    }


def run_of(trainer: Any) -> Run:
    """What the card of a trainer's run says of it."""
    network: Any = bare_model(trainer)
    known = isinstance(network, PreTrainedModel)
    repository = trainer.hub_model_id or trainer.args.hub_model_id
    return Run(
        kind=type(network).__name__,
        module=type(network).__module__,
        model_type=network.config.model_type if known else None,
        model_tags=list(network.model_tags or []) if known else [],
        library="peft" if is_peft_model(unwrapped(trainer)) else "transformers" if known else None,
        base_model=_base_model(trainer),
        tokenizer=trainer.processing_class is not None,
        repository=repository,
        branch=trainer.branch or (trainer.args.hub_revision if repository else None),
        best_step=trainer.state.best_global_step if trainer.args.load_best_model_at_end else None,
        trained_bytes=sum(p.nbytes for p in unwrapped(trainer).parameters() if p.requires_grad),
        metrics=final_metrics(trainer, with_perplexity=task_of(network)[2]),
        procedure=training_procedure(trainer),
    )


def run_in(folder: str) -> Run:
    """The run that has ended in a folder.

    Raises:
        ValueError: nothing there says what it was.
    """
    path = Path(folder, RUN_NAME)
    if not path.is_file():
        raise ValueError(f"{folder}: there is no {RUN_NAME}, which a trainer writes here at the end of its training.")
    try:
        return Run(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:  # no JSON, or not of a run
        raise ValueError(f"{path} is not what a trainer has written: {error}") from error


class RunCallback(TrainerCallback):
    """Writes `zoo_run.json` in the output directory at the end of training, and after what is logged then.

    A run that has begun has none, so that what is there is of the trajectory beside it.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.ended = trainer, False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        self.ended = False
        if state.is_world_process_zero:
            Path(str(args.output_dir), RUN_NAME).unlink(missing_ok=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        self.ended = True
        self.on_log(args, state)

    def on_log(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        if self.ended and state.is_world_process_zero:
            facts = json.dumps(asdict(run_of(self.trainer)), indent=1, ensure_ascii=False)
            Path(str(args.output_dir), RUN_NAME).write_text(f"{facts}\n", encoding="utf-8")


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


def _summary(run: Run, base: Names, dataset: Names) -> str:
    kind = f"`{run.kind}`"
    origin = f"fine-tuned from [{base}](https://huggingface.co/{base})" if base else "trained from scratch"
    if run.model_type is not None:
        kind += f" (model type `{run.model_type}`)"
    elif not base:
        origin = "trained"  # its weights may have come from anywhere
    text = f" on {', '.join(_listed(dataset))}" if dataset else ""
    return f"{kind}, {origin}{text} without backpropagation."


def _tags(run: Run, tags: Names) -> list[str]:
    family = ["rnn"] if run.is_ours else []
    return sorted({"zoo_hf", "zeroth-order", *family, *run.model_tags, *_listed(tags)})


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
