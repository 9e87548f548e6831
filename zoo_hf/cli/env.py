"""`zoo-hf env`."""

import argparse
import os
import platform

import torch

from ..models.choices import choices
from ..procedure import hardware, versions
from .table import markdown_table


SETTINGS = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "HF_HUB_OFFLINE")


def add_env(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`zoo-hf env`."""
    parser = commands.add_parser(
        "env",
        help="print versions, devices and threads, as a table for a bug report",
        description="Prints versions, devices and threads, as a Markdown table to paste into a bug report.",
    )
    parser.set_defaults(run=lambda _: print(markdown_table(environment())))


def environment() -> dict[str, str]:
    """What a bug report needs to know of this machine: versions, devices, threads, settings."""
    return {
        **versions(),
        "platform": platform.platform(),
        "CUDA": torch.version.cuda or "not in this build of torch",
        "hardware": hardware(),
        "cores": str(os.cpu_count()),
        **{f"kernels of {name}": choice for name, choice in choices().items()},
        "threads": f"{torch.get_num_threads()}, between operations {torch.get_num_interop_threads()}",
        **{name: os.environ[name] for name in SETTINGS if name in os.environ},
    }
