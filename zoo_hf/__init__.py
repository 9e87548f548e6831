"""zoo_hf trains Hugging Face models without backpropagation."""

from .config import ZOOArguments, ZOOConfig
from .estimators import CentralDifference, Estimate, ForwardDifference
from .models import RNNConfig, RNNForCausalLM, RNNModel
from .noise import Direction, entries, philox4x32
from .perturbation import Member, perturbed, probe
from .trainer import ZOOTrainer, ZOOTrainerMixin
from .update import Update, gradient


__all__ = [
    "CentralDifference",
    "Direction",
    "Estimate",
    "ForwardDifference",
    "Member",
    "RNNConfig",
    "RNNForCausalLM",
    "RNNModel",
    "Update",
    "ZOOArguments",
    "ZOOConfig",
    "ZOOTrainer",
    "ZOOTrainerMixin",
    "entries",
    "gradient",
    "perturbed",
    "philox4x32",
    "probe",
]
