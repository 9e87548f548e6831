"""How others load a trained model, and replay its run: the code and the commands of its card."""

from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model  # peft itself takes a second to import
from torch import nn
from transformers import PreTrainedModel, Trainer

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


def task_of(model: nn.Module) -> tuple[str | None, str, bool]:
    """(pipeline, ending of the Auto class, whether the loss is in nats a token), by the name of the model's class."""
    name = type(model).__name__
    return next((task for ending, task in TASKS.items() if name.endswith(ending)), OTHER_TASK)


def bare_model(trainer: Trainer) -> nn.Module:
    """The model, without an adapter or a wrapper around it."""
    model: Any = unwrapped(trainer)
    return model.get_base_model() if is_peft_model(model) else model


def is_ours(network: nn.Module) -> bool:
    return type(network).__module__.startswith("zoo_hf.")


def library_of(trainer: Trainer) -> str | None:
    """The library whose `from_pretrained` loads what was saved."""
    if is_peft_model(unwrapped(trainer)):
        return "peft"
    return "transformers" if isinstance(bare_model(trainer), PreTrainedModel) else None


def repository_of(trainer: Trainer) -> str:
    """Where the model is: its repository, or else its folder."""
    return str(hub_id(trainer) or trainer.args.output_dir)


def hub_id(trainer: Trainer) -> str | None:
    return trainer.hub_model_id or trainer.args.hub_model_id


def branch_of(trainer: Any) -> str | None:
    """The branch that was pushed to last, or is to be; None for the main one."""
    return trainer.branch or (trainer.args.hub_revision if hub_id(trainer) else None)


def at(branch: str | None) -> str:
    """A branch as a further argument of what loads."""
    return f', revision="{branch}"' if branch else ""


def loading_code(trainer: Trainer) -> str:
    """Python lines that load the trained model, and its tokenizer if there is one."""
    network, library, place = bare_model(trainer), library_of(trainer), repository_of(trainer)
    if library is None:
        return loading_code_of_a_module(trainer)
    auto = f"Auto{'Peft' if library == 'peft' else ''}Model{task_of(network)[1]}"
    names, calls = [auto], [f'model = {auto}.from_pretrained("{place}"{at(branch_of(trainer))})']
    if trainer.processing_class is not None:
        names.append("AutoTokenizer")
        calls.append(f'tokenizer = AutoTokenizer.from_pretrained("{place}"{at(branch_of(trainer))})')
    imports = [f"from transformers import {', '.join(names)}"]
    if library == "peft":
        imports = [f"from peft import {auto}", *(f"from transformers import {name}" for name in names[1:])]
    if is_ours(network):
        imports.insert(0, "import zoo_hf  # knows this kind of model; without it, add trust_remote_code=True below")
    return "\n".join([*imports, "", *calls])


def loading_code_of_a_module(trainer: Trainer) -> str:
    """Python lines that load the weights of a model that no library knows."""
    imports, weights = ["from safetensors.torch import load_model"], f'"{trainer.args.output_dir}/model.safetensors"'
    if hub_id(trainer):
        imports.insert(0, "from huggingface_hub import hf_hub_download")
        weights = f'hf_hub_download("{hub_id(trainer)}", "model.safetensors"{at(branch_of(trainer))})'
    kind = type(bare_model(trainer)).__name__
    made = f"model = {kind}(...)  # a class of its own: take it from where it was trained"
    return "\n".join([*imports, "", made, f"load_model(model, {weights})"])


def replaying(trainer: Any, trajectory_of: str | None) -> dict[str, Any]:
    """What the card says of the trajectory; where the repository has nothing else, the code that loads it as well.

    Args:
        trajectory_of: that repository.
    """
    found = Trajectory.find(Path(str(trainer.args.output_dir), FILE_NAME))
    if found is None:
        return {"replay": None}
    state, branch = trainer.state, branch_of(trainer)
    place, base = trajectory_of or repository_of(trainer), found.header.origin.get("base")
    remote = base and type(bare_model(trainer)).__module__.startswith("transformers_modules.")
    options = [f"--revision {branch}"] if branch else []
    if trainer.args.load_best_model_at_end and state.best_global_step is not None:
        options.append(f"--upto {state.best_global_step}")
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
    lines = ["import zoo_hf", "", f'model = zoo_hf.load_from_trajectory("{place}"{at(branch)}{trust})']
    if trainer.processing_class is not None:
        lines[1:1] = ["from transformers import AutoTokenizer"]
        own = f'"{base}"' if base else f'"{place}"{at(branch)}'
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({own})")
    trained = sum(p.nbytes for p in unwrapped(trainer).parameters() if p.requires_grad)
    return facts | {"loading": "\n".join(lines), "weights_size": size(trained), "only": True}


def size(of: int) -> str:
    """Bytes, in words."""
    return f"{of / 1e6:,.1f} MB" if of >= 1e6 else f"{of / 1e3:,.0f} kB"
