"""The model of a run and its tokenizer, loaded or new."""

import math
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)

from ..tasks import byte_tokenizer
from .arguments import ModelArguments
from .mistake import Mistake


def load_trained(name: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """A trained model, on a GPU if there is one, and its tokenizer."""
    tokenizer = load_tokenizer(ModelArguments(model_name_or_path=name, trust_remote_code=trust_remote_code))
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto", trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise Mistake(f"The model {name} cannot be loaded: {error}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def load_tokenizer(model_args: ModelArguments) -> Any:
    name: Any = model_args.tokenizer_name or model_args.model_name_or_path
    try:
        return AutoTokenizer.from_pretrained(name, **model_args.hub) if name else byte_tokenizer()
    except (OSError, ValueError) as error:
        raise Mistake(f"The tokenizer {name} cannot be loaded: {error}") from error


def load_model(model_args: ModelArguments, tokenizer: Any) -> Any:
    """A trained model to fine-tune, or a new one whose vocabulary is the tokenizer's."""
    if not model_args.model_name_or_path:
        return new_model(model_args, tokenizer)
    name, dtype = model_args.model_name_or_path, model_args.dtype
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **model_args.hub)
    except (OSError, ValueError) as error:
        raise Mistake(f"--model_name_or_path {name}: {error}") from error


def new_model(model_args: ModelArguments, tokenizer: Any) -> Any:
    """Of the configuration that the arguments name, with the tokenizer's special tokens."""
    config = new_config(model_args)
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    if model_args.config_overrides:
        try:
            config.update_from_string(model_args.config_overrides)
            config = type(config).from_dict(config.to_dict())  # checks the values
        except ValueError as error:
            raise Mistake(f"--config_overrides {model_args.config_overrides}: {error}") from error
    dtype = "float32" if model_args.dtype == "auto" else model_args.dtype
    trust = model_args.trust_remote_code
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=trust)


def new_config(model_args: ModelArguments) -> Any:
    """The configuration of `--config_name`, or the usual one of `--model_type`."""
    if model_args.config_name:
        try:
            return AutoConfig.from_pretrained(model_args.config_name, **model_args.hub)
        except (OSError, ValueError) as error:
            raise Mistake(f"--config_name {model_args.config_name}: {error}") from error
    known = [config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING]
    if model_args.model_type not in known:
        raise Mistake(f"--model_type {model_args.model_type} is unknown; choose from {', '.join(known)}.")
    return CONFIG_MAPPING[model_args.model_type]()


def longest_context(model: Any) -> float:
    """In tokens; recurrent models have no limit, and no such field."""
    return getattr(model.config, "max_position_embeddings", None) or math.inf
