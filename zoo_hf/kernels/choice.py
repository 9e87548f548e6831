"""Which backend of an operation runs: one rule for all of them, and one environment variable that overrides it."""

import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch


VARIABLE = "ZOO_HF_KERNELS"
BACKENDS = {  # name → the package that it needs beside torch
    "plain": "",  # the formula, operation by operation
    "torch": "",  # torch's own kernels: oneDNN, cuDNN
    "triton": "triton",  # ours
    "fla": "fla",  # flash-linear-attention
    "flashrnn": "flashrnn",
}
PACKAGES = {"fla": "flash-linear-attention"}  # whose import has another name


class BackendError(ValueError):
    """`ZOO_HF_KERNELS` names no backend, or one that cannot run here."""


def backend(preferred: Sequence[str], device: torch.device) -> str:
    """The backend that runs: the first of an operation's that can on this device, or the forced one if it has it.

    Args:
        preferred: those that the operation has and that suit its arguments, the best one first, one that needs
            nothing last.

    Raises:
        BackendError: `ZOO_HF_KERNELS` names no backend, or one that cannot run here.
    """
    forced = os.environ.get(VARIABLE) or "auto"
    if forced not in preferred:
        if forced not in ("auto", *BACKENDS):
            raise BackendError(f"{VARIABLE} must be one of {['auto', *BACKENDS]}, got {forced!r}.")
        return next(name for name in preferred if runs(name, device))
    if not runs(forced, device, asked=True):
        raise BackendError(f"{VARIABLE}={forced} cannot run on {device}: {missing(forced)}, or unset {VARIABLE}.")
    return forced


def runs(name: str, device: torch.device, *, asked: bool = False) -> bool:
    """Whether a backend can run on a device; in Triton's interpreter, which is for tests, only if it is asked for."""
    package = BACKENDS[name]
    if not package:
        return True
    usable = device.type == "cuda" or (asked and os.environ.get("TRITON_INTERPRET") == "1")
    return usable and find_spec(package) is not None


def missing(name: str) -> str:
    """What a backend lacks, as an advice."""
    if find_spec(BACKENDS[name]) is None:
        return f"`pip install {PACKAGES.get(name, name)}`"
    return "move the model to a GPU, or set TRITON_INTERPRET=1 before Python starts, which is slow and for tests"
