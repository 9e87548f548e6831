"""Recurrent language models for transformers, known to its Auto classes once this package is imported."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .configuration_rnn import RNNConfig
from .modeling_rnn import RNNForCausalLM, RNNModel


AutoConfig.register("zoo_rnn", RNNConfig, exist_ok=True)
AutoModel.register(RNNConfig, RNNModel, exist_ok=True)
AutoModelForCausalLM.register(RNNConfig, RNNForCausalLM, exist_ok=True)
# the Trainer's label smoothing shifts the labels of the classes in this table, which `register` does not write
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["zoo_rnn"] = RNNForCausalLM.__name__

# save_pretrained and push_to_hub write the code next to the weights: a checkpoint loads without zoo_hf
RNNConfig.register_for_auto_class()
RNNModel.register_for_auto_class("AutoModel")
RNNForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["RNNConfig", "RNNForCausalLM", "RNNModel"]
