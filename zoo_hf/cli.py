"""The `zoo-hf` command."""

import argparse
import os
import platform
from collections.abc import Sequence

import torch

from .cards import hardware, versions


SETTINGS = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "HF_HUB_OFFLINE")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments`, by default those of the command line; 0 when it went well."""
    parser = argparse.ArgumentParser(
        prog="zoo-hf", description="Trains Hugging Face models, recurrent ones above all, without backpropagation."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    env = commands.add_parser(
        "env",
        help="print versions, devices and threads, as a table for a bug report",
        description="Prints versions, devices and threads, as a Markdown table to paste into a bug report.",
    )
    env.set_defaults(run=lambda: print(markdown_table(environment())))
    parser.parse_args(arguments).run()
    return 0


def environment() -> dict[str, str]:
    """What a bug report needs to know of this machine: versions, devices, threads, settings."""
    return {
        **versions(),
        "platform": platform.platform(),
        "CUDA": torch.version.cuda or "not in this build of torch",
        "hardware": hardware(),
        "cores": str(os.cpu_count()),
        "threads": f"{torch.get_num_threads()}, between operations {torch.get_num_interop_threads()}",
        **{name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def markdown_table(rows: dict[str, str]) -> str:
    """Names and values as a Markdown table, its columns aligned."""
    width = max(map(len, rows))
    lines = [f"| {name:<{width}} | {value} |" for name, value in rows.items()]
    return "\n".join([f"| {'':<{width}} | |", f"| {'-' * width} | --- |", *lines])
