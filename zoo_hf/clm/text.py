"""The text of a run, and its blocks of tokens."""

from pathlib import Path
from typing import Any

import datasets

from ..tasks import python_documentation, token_blocks
from .arguments import LOADERS, DataTrainingArguments, ModelArguments
from .mistake import Mistake


def load_text(data_args: DataTrainingArguments, model_args: ModelArguments) -> dict[str, Any]:
    """The text as rows, in a split `train` and, if it has one, a split `validation`."""
    source: dict[str, Any] = {"path": data_args.dataset_name, "name": data_args.dataset_config_name}
    if data_args.train_file:
        loader = LOADERS[Path(data_args.train_file).suffix]
        files = {"train": data_args.train_file, "validation": data_args.validation_file}
        source = {"path": loader, "data_files": {split: name for split, name in files.items() if name}}
        source |= {"keep_linebreaks": data_args.keep_linebreaks} if loader == "text" else {}
    if not source["path"]:
        return python_documentation(data_args.validation_split_percentage)
    # datasets runs no code of a data set since version 4: there is no trust_remote_code to pass on
    hub = {"cache_dir": model_args.cache_dir, "token": model_args.token}
    try:
        splits = datasets.load_dataset(**source, **hub, streaming=data_args.streaming)
    except datasets.exceptions.DatasetGenerationError as error:
        raise Mistake(f"{data_args.title} cannot be read: {error.__cause__ or error}") from error
    if "train" not in splits:
        raise Mistake(f"{data_args.title} has no split `train`, but {', '.join(splits)}.")
    return type(splits)({name: splits[name] for name in ("train", "validation") if name in splits})


def load_blocks(data_args: DataTrainingArguments, model_args: ModelArguments, tokenizer: Any) -> dict[str, Any]:
    """The splits `train` and `validation` as blocks of tokens."""
    size, text = data_args.block_size, load_text(data_args, model_args)
    how: Any = {"num_proc": data_args.preprocessing_num_workers, "load_from_cache_file": not data_args.overwrite_cache}
    try:
        blocks = token_blocks(text, tokenizer, size, **how)
    except ValueError as error:
        raise Mistake(f"{data_args.title}: {error}") from error
    if "validation" not in blocks:
        if data_args.streaming:
            raise Mistake("--streaming cannot split a text before it is read: add --validation_file.")
        blocks = split(blocks["train"], size, data_args.validation_split_percentage)
    for name, most in (("train", data_args.max_train_samples), ("validation", data_args.max_eval_samples)):
        if most is not None:
            blocks[name] = blocks[name].take(most)
        if next(iter(blocks[name]), None) is None:
            raise Mistake(f"--block_size {size} is longer than the {name} text: give a smaller size or more text.")
    return blocks


def split(blocks: datasets.Dataset, size: int, percentage: float) -> dict[str, datasets.Dataset]:
    """The last `percentage` of the blocks as `validation`, those before them as `train`."""
    cut = round(len(blocks) * (1 - percentage / 100))
    if not 0 < cut < len(blocks):
        raise Mistake(
            f"The text has {len(blocks)} blocks of --block_size {size}, too few to evaluate on {percentage} %: "
            "give a smaller size, more text, or another --validation_split_percentage."
        )
    return {"train": blocks.select(range(cut)), "validation": blocks.select(range(cut, len(blocks)))}


def text_of(file: Path | None) -> str:
    """What is in a file; without one, the validation share of CPython's documentation."""
    if file is None:
        return "".join(python_documentation()["validation"]["text"])
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Mistake(f"{file} cannot be read: {error}") from error
    if not text:
        raise Mistake(f"{file}: the file is empty.")
    return text
