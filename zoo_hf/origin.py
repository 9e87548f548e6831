"""From what a run's starting weights are made again: a base model on the Hub, an adapter and noise, or a seed alone.

A trajectory bears its origin, and with it gives the trained weights to somebody who has nothing else.
"""

import json
import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import CONFIG_NAME

from .loading import TASKS, task_of
from .noise import PURPOSE_INITIAL, Blocks, Direction, words_of


AUTO: dict[str, Any] = {f"AutoModel{end}": vars(modeling_auto)[f"AutoModel{end}"] for _, end, _ in TASKS.values()}
NOISE = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")  # parts of a LoRA layer that may start as noise
PLAIN_STARTS = (True, False, "gaussian")  # of `init_lora_weights`: what depends on nothing but noise
APART = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version", "use_cache")  # of no loss
KEPT = "_zoo_origin"  # where a model keeps the origin that it was made from


@dataclass(frozen=True)
class Origin:
    """From what starting weights are made.

    Args:
        auto: Auto class of transformers.
        config: what the base's configuration is changed in; without a base, a whole one with its `model_type`.
        dtype: of the weights.
        seed: of the noise in `drawn`; without a base, of torch's generator when the weights are initialised.
        base: name of a model on the Hub.
        revision: its commit, 40 hexadecimal digits.
        adapter: what a `LoraConfig` differs in from its defaults; None: there is no adapter.
        drawn: name of a tensor that the base does not have → bound b of the noise it starts from, see `draw_`.
    """

    auto: str
    config: dict[str, Any]
    dtype: str
    seed: int
    base: str | None = None
    revision: str | None = None
    adapter: dict[str, Any] | None = None
    drawn: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.auto not in AUTO:
            raise ValueError(f"`auto` must be one of {sorted(AUTO)}, got {self.auto!r}.")
        commit = isinstance(self.revision, str) and len(self.revision) == 40
        if self.base is not None and (not isinstance(self.base, str) or not commit):
            raise ValueError(
                f"`base` and `revision` are {self.base!r} and {self.revision!r}, and no commit of a model."
            )
        if not isinstance(vars(torch).get(self.dtype), torch.dtype):
            raise ValueError(f"`dtype` is {self.dtype!r}, which torch does not have.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed` must be in [0, 2**32), got {self.seed}.")
        try:
            json.dumps(self.config)
        except TypeError as error:
            raise ValueError(f"What is changed in the configuration is recorded as JSON: {error}.") from error


Bounds = Callable[[nn.Module, Collection[str]], dict[str, float]]  # model, its new tensors → what to draw them with


def from_base(
    base: str,
    *,
    auto: str = "AutoModelForCausalLM",
    adapter: Any = None,
    seed: int = 0,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    **config: Any,
) -> nn.Module:
    """A model of the Hub to be tuned, such that the trajectory alone gives the tuned weights again.

    Tensors that the base does not have (a new head, an adapter's A) start as uniform noise from counters instead of
    torch's generator, with the standard deviation that their library gives them; constant ones stay as they are.

    Args:
        base: name of a model on the Hub.
        auto: the Auto class of transformers to load it with.
        adapter: a `peft.LoraConfig`.
        seed: of the noise, in [0, 2³²).
        revision: branch, tag or commit of the base; what it stands for now is what the trajectory names.
        dtype: of the base's weights, as they were saved by default.
        config: what to change in the base's configuration, such as `num_labels=2`.

    Raises:
        ValueError: the base is a folder of this machine, or the adapter starts from what is no noise.
        OSError: the Hub has no such model, or none that this token may read.
    """
    found = AutoConfig.from_pretrained(base, revision=revision, token=token, trust_remote_code=trust_remote_code)
    for name in config:
        if name not in dir(found):
            raise ValueError(f"The configuration of {base}, {type(found).__name__}, has no `{name}`.")
    commit = commit_of(base, revision or "main")
    if commit is None:
        raise ValueError(
            f"`base` must be the name of a model on the Hub, got {base!r}: what starts from a folder of this machine "
            "cannot be made again elsewhere. Push it first, or load it with `from_pretrained`."
        )
    wide = "auto" if dtype is None else dtype
    start = Origin(auto, config, "float32", seed, base, commit, adapter_fields(adapter))
    model, drawn = assembled(start, wide, measured, token=token, trust_remote_code=trust_remote_code)
    inner: Any = model.get_base_model() if start.adapter is not None else model  # type: ignore[operator]
    actual = str(inner.dtype).removeprefix("torch.")
    vars(model)[KEPT] = Origin(auto, config, actual, seed, base, start.revision, start.adapter, drawn)
    return model


def made_again(origin: dict[str, Any], *, token: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """The starting weights that a header names.

    Raises:
        ValueError: it makes no sense.
        OSError: the Hub has no such base, or none that this token may read.
    """
    try:
        known = Origin(**origin)
    except TypeError as error:
        raise ValueError(f"the origin makes no sense: {error}") from error
    dtype = vars(torch)[known.dtype]
    if known.base is None:
        fields_of_config = dict(known.config)
        config = AutoConfig.for_model(fields_of_config.pop("model_type"), **fields_of_config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(known.seed)
            return AUTO[known.auto].from_config(config, dtype=dtype)

    def recorded(model: nn.Module, new: Collection[str]) -> dict[str, float]:
        return {name: bound for name, bound in known.drawn.items() if name in new}

    model, _ = assembled(known, dtype, recorded, token=token, trust_remote_code=trust_remote_code)
    return model


def assembled(
    origin: Origin, dtype: torch.dtype | str, bounds: Bounds, *, token: str | None, trust_remote_code: bool
) -> tuple[nn.Module, dict[str, float]]:
    """Base, new tensors and adapter put together, and what was drawn."""
    access = {"revision": origin.revision, "token": token, "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(str(origin.base), **access)
    for name, value in origin.config.items():
        setattr(config, name, value)
    model, found = AUTO[origin.auto].from_pretrained(
        origin.base, config=config, dtype=dtype, output_loading_info=True, **access
    )
    drawn = bounds(model, found["missing_keys"])
    draw_(model, drawn, origin.seed)
    if origin.adapter is None:
        return model, drawn
    from peft import LoraConfig, get_peft_model  # here, as it takes a second to import

    model = get_peft_model(model, LoraConfig(**origin.adapter))
    new = bounds(model, [n for n, _ in model.named_parameters() if any(part in n.split(".") for part in NOISE)])
    draw_(model, new, origin.seed)
    return model, drawn | new


def measured(model: nn.Module, new: Collection[str]) -> dict[str, float]:
    """√3 times the standard deviation of new tensors that are not constant, to six digits."""
    parameters = dict(model.named_parameters())
    spreads = {name: parameters[name].float().std(correction=0).item() for name in sorted(new) if name in parameters}
    return {name: float(f"{math.sqrt(3) * spread:.6g}") for name, spread in spreads.items() if spread > 0}


@torch.no_grad()
def draw_(model: nn.Module, bounds: dict[str, float], seed: int) -> None:
    """Fill parameters with uniform noise in [−b, b), b their bound."""
    for name, bound in bounds.items():
        parameter = model.get_parameter(name)
        parameter.copy_((uniform(seed, name, parameter.numel()) * bound).view_as(parameter))


def uniform(seed: int, name: str, numel: int) -> Tensor:
    """Entries of a parameter's initial weights, uniform in [−1, 1), (numel,) float32; the same bits on all machines.

    Entry e is ⌊w/2⁸⌋/2²³ − 1, w the word e mod 4 of block ⌊e/4⌋ of the purpose "initial weights".
    """
    blocks = Blocks(name, 0, -(-numel // 4), PURPOSE_INITIAL)
    found = torch.empty(blocks.stop, 4)
    for first, last, words in words_of([Direction(seed, 0, 0)], [blocks], found.device):
        for place, word in enumerate(words):
            found[first:last, place] = (word[0] >> 8).float() * 2.0**-23 - 1
    return found.view(-1)[:numel]


def commit_of(name: str, revision: str = "main") -> str | None:
    """The commit of a model on the Hub that this machine has in its cache; None for a folder, or where it has none."""
    try:
        found = None if Path(name).is_dir() else try_to_load_from_cache(name, CONFIG_NAME, revision=revision)
    except HFValidationError:  # a folder that is gone
        return None
    return Path(found).parent.name if isinstance(found, str) else None


def adapter_fields(adapter: Any) -> dict[str, Any] | None:
    """What an adapter's configuration differs in from the defaults, as JSON has it.

    Raises:
        ValueError: it is of another kind, or its weights start from what is no noise.
    """
    if adapter is None:
        return None
    from peft import LoraConfig

    if type(adapter) is not LoraConfig or adapter.init_lora_weights not in PLAIN_STARTS:
        raise ValueError(
            f"`adapter` must be a `peft.LoraConfig` with `init_lora_weights` one of {PLAIN_STARTS}, got {adapter}: "
            "other adapters start from what a trajectory does not name. Add it to the model yourself, and publish "
            "the adapter's weights with `push_to_hub`."
        )
    plain, chosen = LoraConfig(), {}
    for each in fields(adapter):
        value, usual = vars(adapter)[each.name], vars(plain)[each.name]
        if value != usual:
            chosen[each.name] = sorted(value) if isinstance(value, set) else value
    return json.loads(json.dumps(chosen))


def origin_of(model: nn.Module, seed: int) -> dict[str, Any]:
    """What a header says of where a model's weights come from; nothing where only this process knows.

    It is a claim, which the hash of the starting weights proves or not.

    Args:
        seed: with which new weights were initialised.
    """
    if KEPT in vars(model):
        return asdict(with_changes(vars(model)[KEPT], model))
    if not isinstance(model, PreTrainedModel) or not type(model).__name__.endswith(tuple(TASKS)):
        return {}
    auto = f"AutoModel{task_of(model)[1]}"
    config, dtype = model.config, str(model.dtype).removeprefix("torch.")
    if config._name_or_path:
        commit = commit_of(config._name_or_path)
        found = None if commit is None else Origin(auto, {}, dtype, seed, config._name_or_path, commit)
        return {} if found is None else asdict(with_changes(found, model))
    return asdict(Origin(auto, as_json(config.to_diff_dict()), dtype, seed))


def with_changes(origin: Origin, model: Any) -> Origin:
    """An origin with all in which a model's configuration differs from its base's."""
    config = (model.get_base_model() if origin.adapter is not None else model).config
    base = type(config).from_pretrained(origin.base, revision=origin.revision, local_files_only=True)
    now, before = as_json(config.to_dict()), as_json(base.to_dict())
    changed = {name: value for name, value in now.items() if name not in APART and before.get(name) != value}
    return replace(origin, config=changed | origin.config)


def as_json(fields_of_config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as JSON gives it back; text stands for what JSON has no word for, as nothing may stop a run."""
    return json.loads(json.dumps(fields_of_config, default=str))
