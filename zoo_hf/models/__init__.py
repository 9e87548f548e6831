"""Recurrent language models for transformers, known to its Auto classes once this package is imported."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_rnn import RNNConfig
from .modeling_rnn import RNNForCausalLM, RNNModel


AutoConfig.register("zoo_rnn", RNNConfig, exist_ok=True)
AutoModel.register(RNNConfig, RNNModel, exist_ok=True)
AutoModelForCausalLM.register(RNNConfig, RNNForCausalLM, exist_ok=True)

# save_pretrained and push_to_hub write the code next to the weights: a checkpoint loads without zoo_hf
RNNConfig.register_for_auto_class()
RNNModel.register_for_auto_class("AutoModel")
RNNForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["RNNConfig", "RNNForCausalLM", "RNNModel"]
