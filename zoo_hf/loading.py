"""How others load a trained model, and replay its run: the code and the commands of its card."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model  # peft itself takes a second to import
from torch import nn
from transformers import Trainer

from .procedure import unwrapped
from .trajectory import FILE_NAME, Trajectory


# how the name of a model's class ends → its pipeline, its Auto class, whether its loss is in nats a token
TASKS = {
    "ForCausalLM": ("text-generation", "ForCausalLM", True),
    "LMHeadModel": ("text-generation", "ForCausalLM", True),
    "ForConditionalGeneration": (None, "ForSeq2SeqLM", True),
    "ForSequenceClassification": ("text-classification", "ForSequenceClassification", False),
    "ForTokenClassification": ("token-classification", "ForTokenClassification", False),
    "ForQuestionAnswering": ("question-answering", "ForQuestionAnswering", False),
    "Model": (None, "", False),
}
OTHER_TASK = (None, "", False)


@dataclass(frozen=True)
class Run:
    """What a card says of a run that its folder does not, as it is in `zoo_run.json` there.

    Args:
        kind: name of the model's class, without an adapter or a wrapper around it.
        module: where that class is.
        model_type: of its configuration; None for a model that is not of transformers.
        model_tags: that it has by itself.
        library: whose `from_pretrained` loads what was saved.
        base_model: name on the Hub of what was fine-tuned.
        tokenizer: whether one is saved with the model.
        repository: on the Hub, if the run has one.
        branch: of that, where it is not the main one.
        best_step: whose weights the run ended with, where they are not the last.
        trained_bytes: of the weights that were trained.
        metrics: of the last evaluation.
        procedure: how it was trained, see `training_procedure`.
    """

    kind: str
    module: str
    model_type: str | None
    model_tags: list[str]
    library: str | None
    base_model: str | None
    tokenizer: bool
    repository: str | None
    branch: str | None
    best_step: int | None
    trained_bytes: int
    metrics: dict[str, float]
    procedure: dict[str, Any]

    @property
    def is_ours(self) -> bool:
        return self.module.startswith("zoo_hf.")

    @property
    def has_remote_code(self) -> bool:
        return self.module.startswith("transformers_modules.")


def task_of(model: nn.Module) -> tuple[str | None, str, bool]:
    """(pipeline, ending of the Auto class, whether the loss is in nats a token), by the name of the model's class."""
    return task_named(type(model).__name__)


def task_named(kind: str) -> tuple[str | None, str, bool]:
    return next((task for ending, task in TASKS.items() if kind.endswith(ending)), OTHER_TASK)


def bare_model(trainer: Trainer) -> nn.Module:
    """The model, without an adapter or a wrapper around it."""
    model: Any = unwrapped(trainer)
    return model.get_base_model() if is_peft_model(model) else model


def at(branch: str | None) -> str:
    """A branch as a further argument of what loads."""
    return f', revision="{branch}"' if branch else ""


def loading_code(run: Run, folder: str) -> str:
    """Python lines that load the trained model, and its tokenizer if there is one."""
    place = run.repository or folder
    if run.library is None:
        return loading_code_of_a_module(run, folder)
    auto = f"Auto{'Peft' if run.library == 'peft' else ''}Model{task_named(run.kind)[1]}"
    names, calls = [auto], [f'model = {auto}.from_pretrained("{place}"{at(run.branch)})']
    if run.tokenizer:
        names.append("AutoTokenizer")
        calls.append(f'tokenizer = AutoTokenizer.from_pretrained("{place}"{at(run.branch)})')
    imports = [f"from transformers import {', '.join(names)}"]
    if run.library == "peft":
        imports = [f"from peft import {auto}", *(f"from transformers import {name}" for name in names[1:])]
    if run.is_ours:
        imports.insert(0, "import zoo_hf  # knows this kind of model; without it, add trust_remote_code=True below")
    return "\n".join([*imports, "", *calls])


def loading_code_of_a_module(run: Run, folder: str) -> str:
    """Python lines that load the weights of a model that no library knows."""
    imports, weights = ["from safetensors.torch import load_model"], f'"{folder}/model.safetensors"'
    if run.repository:
        imports.insert(0, "from huggingface_hub import hf_hub_download")
        weights = f'hf_hub_download("{run.repository}", "model.safetensors"{at(run.branch)})'
    made = f"model = {run.kind}(...)  # a class of its own: take it from where it was trained"
    return "\n".join([*imports, "", made, f"load_model(model, {weights})"])


def replaying(run: Run, folder: str, trajectory_of: str | None) -> dict[str, Any]:
    """What the card says of the trajectory; where the repository has nothing else, the code that loads it as well.

    Args:
        trajectory_of: that repository.
    """
    found = Trajectory.find(Path(folder, FILE_NAME))
    if found is None:
        return {"replay": None}
    place, base = trajectory_of or run.repository or folder, found.header.origin.get("base")
    remote = base and run.has_remote_code
    options = [f"--revision {run.branch}"] if run.branch else []
    if run.best_step is not None:
        options.append(f"--upto {run.best_step}")
    if remote:
        options.append("--trust_remote_code")
    facts = {
        "replay": place,
        "replay_options": " ".join(["", *options]),
        "started_from": found.header.started_from,
        "origin": found.header.origin,
        "trajectory_size": size(found.end),
    }
    if trajectory_of is None:
        return facts
    trust = ", trust_remote_code=True" if remote else ""
    lines = ["import zoo_hf", "", f'model = zoo_hf.load_from_trajectory("{place}"{at(run.branch)}{trust})']
    if run.tokenizer:
        lines[1:1] = ["from transformers import AutoTokenizer"]
        own = f'"{base}"' if base else f'"{place}"{at(run.branch)}'
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({own})")
    return facts | {"loading": "\n".join(lines), "weights_size": size(run.trained_bytes), "only": True}


def size(of: int) -> str:
    """Bytes, in words."""
    return f"{of / 1e6:,.1f} MB" if of >= 1e6 else f"{of / 1e3:,.0f} kB"
