"""Recurrent language models for transformers, known to its Auto classes once this package is imported."""

from functools import partial

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .. import kernels
from ..kernels import flashrnn
from ..kernels.choice import backend
from .backends import ADDED, Kernel
from .configuration_dnc import DNCConfig
from .configuration_mamba2 import ZooMamba2Config
from .configuration_rnn import RNNConfig
from .configuration_rwkv7 import RWKV7Config
from .modeling_dnc import DNCForCausalLM, DNCModel
from .modeling_mamba2 import ZooMamba2ForCausalLM, ZooMamba2Model
from .modeling_rnn import CELLS, RNNForCausalLM, RNNModel
from .modeling_rwkv7 import RWKV7ForCausalLM, RWKV7Model


def _register(
    config: type[PreTrainedConfig], model: type[PreTrainedModel], language_model: type[PreTrainedModel]
) -> None:
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForCausalLM.register(config, language_model, exist_ok=True)
    # the Trainer's label smoothing shifts the labels of the classes in this table, which `register` does not write
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] = language_model.__name__
    # save_pretrained and push_to_hub write the code next to the weights: a checkpoint loads without zoo_hf
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
    language_model.register_for_auto_class("AutoModelForCausalLM")


_register(DNCConfig, DNCModel, DNCForCausalLM)
_register(RNNConfig, RNNModel, RNNForCausalLM)
_register(RWKV7Config, RWKV7Model, RWKV7ForCausalLM)
_register(ZooMamba2Config, ZooMamba2Model, ZooMamba2ForCausalLM)

for _cell in CELLS:
    ADDED.forms[_cell] = {"triton": partial(kernels.scan.scan, _cell), "flashrnn": partial(flashrnn.scan, _cell)}
ADDED.choose = backend
ADDED.kernels = {
    "head_loss": Kernel(kernels.head_loss.suits, kernels.head_loss.token_losses),
    "rwkv7": Kernel(kernels.rwkv7.suits, torch.ops.zoo_hf.rwkv7_scan),
    "mamba2": Kernel(kernels.mamba2.suits, torch.ops.zoo_hf.mamba2_scan),
}

__all__ = [
    "DNCConfig",
    "DNCForCausalLM",
    "DNCModel",
    "RNNConfig",
    "RNNForCausalLM",
    "RNNModel",
    "RWKV7Config",
    "RWKV7ForCausalLM",
    "RWKV7Model",
    "ZooMamba2Config",
    "ZooMamba2ForCausalLM",
    "ZooMamba2Model",
]
