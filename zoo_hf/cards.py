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
from .procedure import training_procedure, unwrapped
from .trajectory import FILE_NAME, Trajectory


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
        library_name="zoo_hf" if trajectory_of else _library(trainer),
        pipeline_tag=next(iter(_listed(tasks)), pipeline),
        tags=_tags(network, [*_listed(tags), *(["trajectory"] if trajectory_of else [])]),
        base_model=finetuned_from or _base_model(trainer),
        datasets=_listed(dataset_tags) or None,
        model_name=model_name or Path(_repository(trainer)).name,
        eval_results=_eval_results(metrics, pipeline, dataset_tags, dataset, dataset_args) or None,
    )
    variables = content(trainer, data, metrics, dataset) | replaying(trainer, trajectory_of)
    return ModelCard.from_template(data, template_path=str(TEMPLATE), **variables)


def content(trainer: Trainer, data: ModelCardData, metrics: dict[str, float], dataset: Names) -> dict[str, Any]:
    """The variables of the template."""
    network = bare_model(trainer)
    return {
        "name": data.model_name,
        "summary": _summary(network, data.base_model, dataset),
        "plot": PLOT_NAME if Path(str(trainer.args.output_dir), PLOT_NAME).exists() else None,
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


def replaying(trainer: Trainer, trajectory_of: str | None) -> dict[str, Any]:
    """What the card says of the trajectory: `replay` is where it is, None for none; `origin` whether it knows its own.

    Where the repository has no weights, the code that loads the model replays it.
    """
    path = Path(str(trainer.args.output_dir), FILE_NAME)
    found = Trajectory.find(path)
    if found is None:
        return {"replay": None}
    place, weights = trajectory_of or _repository(trainer), sum(p.nbytes for p in unwrapped(trainer).parameters())
    facts = {"replay": place, "origin": found.header.origin, "trajectory_size": size(found.end)}
    if trajectory_of is None:
        return facts
    code = f'import zoo_hf\n\nmodel = zoo_hf.load_from_trajectory("{trajectory_of}")'
    return facts | {"loading": code, "weights_size": size(weights), "only": True}


def size(of: int) -> str:
    """Bytes, in words."""
    return f"{of / 1e6:,.1f} MB" if of >= 1e6 else f"{of / 1e3:,.0f} kB"


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


def bare_model(trainer: Trainer) -> nn.Module:
    """The model, without an adapter or a wrapper around it."""
    model: Any = unwrapped(trainer)
    return model.get_base_model() if is_peft_model(model) else model


def _library(trainer: Trainer) -> str | None:
    """The library whose `from_pretrained` loads what was saved."""
    if is_peft_model(unwrapped(trainer)):
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
    family = ["rnn"] if _is_ours(network) else []
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
