"""zoo_hf trains Hugging Face models without backpropagation."""

from .config import ZOOArguments, ZOOConfig
from .estimators import CentralDifference, Estimate, ForwardDifference
from .gradients import gradient
from .hub import load_from_trajectory
from .models import (
    DNCConfig,
    DNCForCausalLM,
    DNCModel,
    RNNConfig,
    RNNForCausalLM,
    RNNModel,
    RWKV7Config,
    RWKV7ForCausalLM,
    RWKV7Model,
    ZooMamba2Config,
    ZooMamba2ForCausalLM,
    ZooMamba2Model,
)
from .noise import Direction, entries
from .origin import from_base
from .perturbation import Member, perturbed, probe
from .philox import philox4x32
from .pushing import PushError
from .record import TrajectoryError
from .replay import replay
from .trainer import ZOOTrainer, ZOOTrainerMixin
from .trajectory import Trajectory
from .update import Update


__all__ = [
    "CentralDifference",
    "DNCConfig",
    "DNCForCausalLM",
    "DNCModel",
    "Direction",
    "Estimate",
    "ForwardDifference",
    "Member",
    "PushError",
    "RNNConfig",
    "RNNForCausalLM",
    "RNNModel",
    "RWKV7Config",
    "RWKV7ForCausalLM",
    "RWKV7Model",
    "Trajectory",
    "TrajectoryError",
    "Update",
    "ZOOArguments",
    "ZOOConfig",
    "ZOOTrainer",
    "ZOOTrainerMixin",
    "ZooMamba2Config",
    "ZooMamba2ForCausalLM",
    "ZooMamba2Model",
    "entries",
    "from_base",
    "gradient",
    "load_from_trajectory",
    "perturbed",
    "philox4x32",
    "probe",
    "replay",
]
