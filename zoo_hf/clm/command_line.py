"""A command line or a JSON file → the arguments of a run."""

import json
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from ..config import ZOOConfig
from .arguments import DataTrainingArguments, ModelArguments
from .mistake import Mistake


# These take the place of the arguments' defaults: always, and in the job that runs when no text is named.
ANY_JOB: dict[str, Any] = {"dataloader_pin_memory": torch.cuda.is_available()}
MAIN_JOB: dict[str, Any] = {
    "output_dir": "outputs/lstm-python-docs",
    "do_train": True,
    "do_eval": True,
    "smoothing_radius": 1e-2,
    "block_size": 32,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 128,
    "max_steps": 1500,
    "logging_steps": 25,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "eval_on_start": True,
    "num_threads": 1,  # a model this small gains nothing from a second thread, and loses much by waiting for it
}


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is."""


def parse_arguments(
    arguments: list[str], description: str | None, command: str | None = None
) -> tuple[ModelArguments, DataTrainingArguments, ZOOConfig]:
    """The arguments of the command line, or of the JSON file it names; those of `MAIN_JOB` where no text is named.

    Args:
        description: what `--help` says first.
        command: what was typed before the arguments; by default the name of the script.
    """
    job = "".join(f"    --{name} {value}\n" for name, value in MAIN_JOB.items())
    description = f"{description}\nWithout a text, these take the place of the defaults below:\n\n{job}"
    kinds: Any = (ModelArguments, DataTrainingArguments, ZOOConfig)
    parser: Any = HfArgumentParser(kinds, prog=command, description=description, formatter_class=HelpFormatter)
    try:
        if len(arguments) == 1 and arguments[0].endswith(".json"):
            given = read_job(Path(arguments[0]))
            return parser.parse_dict(defaults(given) | given)
        parser.set_defaults(**defaults(vars(parser.parse_args(arguments))))
        return parser.parse_args_into_dataclasses(arguments)
    except ValueError as error:  # from the checks of the arguments' classes
        raise Mistake(str(error)) from error


def read_job(path: Path) -> dict[str, Any]:
    """The arguments in a JSON file, by name."""
    if not path.is_file():
        raise Mistake(f"{path}: there is no such file.")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Mistake(f"{path} is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise Mistake(f'{path} must hold arguments by name, such as {{"block_size": 64}}.')
    return given


def defaults(given: dict[str, Any]) -> dict[str, Any]:
    """`ANY_JOB`, and `MAIN_JOB` where no text is named; what is to be done, only where that is not said either."""
    if any(given.get(name) for name in ("dataset_name", "train_file", "validation_file")):
        return ANY_JOB
    said = given.get("do_train") or given.get("do_eval")
    return ANY_JOB | {name: v for name, v in MAIN_JOB.items() if not (said and name in ("do_train", "do_eval"))}


def check(data_args: DataTrainingArguments, args: ZOOConfig) -> None:
    """Refuse to do nothing, to train without an end, and over another run's results unless told to."""
    if not (args.do_train or args.do_eval):
        raise Mistake("Nothing to do: give --do_train, --do_eval or both.")
    if data_args.streaming and args.do_train and args.max_steps < 1:
        raise Mistake("--streaming does not know how long the text is: say with --max_steps when to stop.")
    output = Path(str(args.output_dir))
    taken = (output / "config.json").exists() or any(output.glob("checkpoint-*"))
    allowed = data_args.overwrite_output_dir or args.resume_from_checkpoint
    if args.do_train and taken and not allowed and args.output_dir != MAIN_JOB["output_dir"]:
        raise Mistake(
            f"--output_dir {output} holds a trained model: add --resume_from_checkpoint last to go on with it, "
            "--overwrite_output_dir to train over it, or choose another --output_dir."
        )
