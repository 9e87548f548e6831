r"""Trains a causal language model on text without backpropagation.

    python examples/run_clm.py

trains a small LSTM on CPython's own documentation, byte by byte, to a validation loss of 2.08 nats a byte after 96,000
forward passes, two minutes on one core, and writes the model, its tokenizer, a plot of the loss and a model card to
`outputs/lstm-python-docs`. On text and a model of your choice:

    python examples/run_clm.py --train_file notes.txt --do_train --do_eval --output_dir outputs/notes \
        --config_overrides cell_type=gru,hidden_size=128

Several processes share the work: `accelerate launch examples/run_clm.py` on GPUs, and on one CPU
`accelerate launch --multi_gpu --num_processes 2 examples/run_clm.py --use_cpu`. All arguments may stand in a JSON file
instead: `python examples/run_clm.py job.json`. `--help` lists them.
"""

import json
import logging
import math
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    default_data_collator,
    set_seed,
)

from zoo_hf import PushError, ZOOConfig, ZOOTrainer
from zoo_hf.callbacks import LossPlotCallback
from zoo_hf.tasks import (
    bits_per_byte,
    byte_tokenizer,
    likeliest_tokens,
    next_token_accuracy,
    python_documentation,
    token_blocks,
)


# These take the place of the arguments' defaults: always, and in the job that runs when no text is named.
ANY_JOB: dict[str, Any] = {"dataloader_pin_memory": torch.cuda.is_available()}
MAIN_JOB: dict[str, Any] = {
    "output_dir": "outputs/lstm-python-docs",
    "do_train": True,
    "do_eval": True,
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

LOADERS = {".txt": "text", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
PROMPT, SAMPLE_TOKENS = "The ", 200
FIGURES = {
    "eval_loss": "validation loss (nats a token)",
    "eval_accuracy": "share of next tokens guessed",
    "perplexity": "perplexity",
    "bits_per_byte": "bits a byte",
}


class Mistake(ValueError):
    """In the arguments or the text: it says what to change, and ends the script with exit code 2, not a traceback."""


@dataclass
class ModelArguments:
    """Which model is trained, and with which tokenizer."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model to fine-tune: a Hub name or a folder. Unset: train from scratch."},
    )
    model_type: str = field(
        default="zoo_rnn", metadata={"help": "Kind of model to train from scratch, such as zoo_rnn, gpt2 or mamba."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a new model: a Hub name or a folder."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes to the configuration of a new model: cell_type=gru,hidden_size=128."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "A Hub name or a folder. Unset: the model's, or one token a byte."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for what comes from the Hub."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Hub token; unset: that of `hf auth login`."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a model."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Type of the weights; auto: as they were saved, float32 when new."}
    )
    num_threads: int | None = field(
        default=None, metadata={"help": "CPU threads of a process; unset: torch's choice."}
    )

    @property
    def hub(self) -> dict[str, Any]:
        """What every `from_pretrained` is called with."""
        names = {"cache_dir": self.cache_dir, "revision": self.model_revision, "token": self.token}
        return names | {"trust_remote_code": self.trust_remote_code}


@dataclass
class DataTrainingArguments:
    """Which text is trained and evaluated on, and how it is cut."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "Text to train on: .txt, .csv, .jsonl, .parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Text to evaluate on, of the same kind."})
    validation_split_percentage: float = field(
        default=5.0, metadata={"help": "Share of the end of the training text to evaluate on if there is no other."}
    )
    block_size: int = field(default=128, metadata={"help": "Tokens in an example; the text is cut into such blocks."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many blocks at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many blocks at most."})
    streaming: bool = field(default=False, metadata={"help": "Read while training; needs --max_steps."})
    keep_linebreaks: bool = field(default=True, metadata={"help": "Keep the ends of lines of .txt files."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize anew what was tokenized before."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train anew into a folder that already holds a model."}
    )

    def __post_init__(self) -> None:
        if not 0 < self.validation_split_percentage < 100:
            share = self.validation_split_percentage
            raise Mistake(f"--validation_split_percentage must be above 0 and below 100, got {share}.")
        if self.block_size < 2:
            raise Mistake(f"--block_size must be at least 2, got {self.block_size}: one token predicts the next.")
        for flag in ("max_train_samples", "max_eval_samples", "preprocessing_num_workers"):
            number = getattr(self, flag)
            if number is not None and number < 1:
                raise Mistake(f"--{flag} must be at least 1, got {number}: leave it out to set no limit.")
        if self.dataset_name and (self.train_file or self.validation_file):
            raise Mistake("Give either --dataset_name or --train_file and --validation_file, not both.")
        if self.validation_file and not self.train_file:
            raise Mistake("--validation_file needs --train_file beside it; they may be the same file.")
        self.check_files()

    def check_files(self) -> None:
        files = {flag: Path(name) for flag in ("train_file", "validation_file") if (name := getattr(self, flag))}
        for flag, path in files.items():
            if not path.is_file():
                raise Mistake(f"--{flag} {path}: there is no such file.")
            if path.suffix not in LOADERS:
                raise Mistake(f"--{flag} {path}: the name must end in one of {', '.join(LOADERS)}.")
            if not path.stat().st_size:
                raise Mistake(f"--{flag} {path}: the file is empty.")
        if len({path.suffix for path in files.values()}) > 1:
            raise Mistake("--train_file and --validation_file must be files of one kind, with the same ending.")

    @property
    def title(self) -> str:
        """Name of the text, for the model card."""
        return self.dataset_name or (Path(self.train_file).name if self.train_file else "CPython's documentation")


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and this script's docstring as it is."""


def parse_arguments(arguments: list[str]) -> tuple[ModelArguments, DataTrainingArguments, ZOOConfig]:
    """The arguments of the command line, or of the JSON file it names; those of `MAIN_JOB` where no text is named."""
    job = "".join(f"    --{name} {value}\n" for name, value in MAIN_JOB.items())
    description = f"{__doc__}\nWithout a text, these take the place of the defaults below:\n\n{job}"
    kinds = (ModelArguments, DataTrainingArguments, ZOOConfig)
    parser = HfArgumentParser(kinds, description=description, formatter_class=HelpFormatter)
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
    output = Path(args.output_dir)
    taken = (output / "config.json").exists() or any(output.glob("checkpoint-*"))
    allowed = data_args.overwrite_output_dir or args.resume_from_checkpoint
    if args.do_train and taken and not allowed and args.output_dir != MAIN_JOB["output_dir"]:
        raise Mistake(
            f"--output_dir {output} holds a trained model: add --resume_from_checkpoint last to go on with it, "
            "--overwrite_output_dir to train over it, or choose another --output_dir."
        )


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
    how = {"num_proc": data_args.preprocessing_num_workers, "load_from_cache_file": not data_args.overwrite_cache}
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


def load_tokenizer(model_args: ModelArguments) -> Any:
    name = model_args.tokenizer_name or model_args.model_name_or_path
    try:
        return AutoTokenizer.from_pretrained(name, **model_args.hub) if name else byte_tokenizer()
    except (OSError, ValueError) as error:
        raise Mistake(f"The tokenizer {name} cannot be loaded: {error}") from error


def load_model(model_args: ModelArguments, tokenizer: Any) -> Any:
    """A trained model to fine-tune, or a new one whose vocabulary is the tokenizer's."""
    if model_args.model_name_or_path:
        name, dtype = model_args.model_name_or_path, model_args.dtype
        try:
            return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **model_args.hub)
        except OSError as error:
            raise Mistake(f"--model_name_or_path {name}: {error}") from error
    if model_args.config_name:
        config = AutoConfig.from_pretrained(model_args.config_name, **model_args.hub)
    elif model_args.model_type in (known := [config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING]):
        config = CONFIG_MAPPING[model_args.model_type]()
    else:
        raise Mistake(f"--model_type {model_args.model_type} is unknown; choose from {', '.join(known)}.")
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    if model_args.config_overrides:
        try:
            config.update_from_string(model_args.config_overrides)
            config = type(config).from_dict(config.to_dict())  # checks the values
        except ValueError as error:
            raise Mistake(f"--config_overrides {model_args.config_overrides}: {error}") from error
    dtype = "float32" if model_args.dtype == "auto" else model_args.dtype
    trust = model_args.trust_remote_code
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=trust)


def longest_context(model: Any) -> float:
    """In tokens; recurrent models have no limit, and no such field."""
    return getattr(model.config, "max_position_embeddings", None) or math.inf


def sample(trainer: ZOOTrainer, tokenizer: Any) -> str:
    """What the model writes after `PROMPT`, unprintable characters as dots. No generator of the run is advanced."""
    model = trainer.model.eval()
    prompt = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    tokens = min(SAMPLE_TOKENS, longest_context(model) - prompt["input_ids"].shape[1])
    length = {"min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(trainer.args.seed)
        written = model.generate(**prompt, **length, do_sample=True, use_cache=True)[0]
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in tokenizer.decode(written))


def finish(trainer: ZOOTrainer, data_args: DataTrainingArguments, tokenizer: Any, metrics: dict[str, float]) -> None:
    """Say what came out and where it is, and write or push the card."""
    args = trainer.args
    if trainer.is_world_process_zero():
        print(f"\nIt writes now:\n\n{sample(trainer, tokenizer)}\n")
        print("  ".join(f"{text} {metrics[name]:.3f}" for name, text in FIGURES.items() if name in metrics))
        if args.do_train:
            output = Path(args.output_dir).resolve()
            plot = " and loss.png" if (output / "loss.png").exists() else ""
            print(f"Model, tokenizer, README.md (model card){plot} are in {output}")
    card = {"dataset": data_args.title, "dataset_tags": data_args.dataset_name}
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    elif args.do_train:
        trainer.create_model_card(**card)


def make_trainer(**arguments: Any) -> ZOOTrainer:
    """The trainer; what it refuses is the user's mistake."""
    try:
        return ZOOTrainer(**arguments)
    except ValueError as error:
        raise Mistake(str(error)) from error


def set_up_logging(args: ZOOConfig) -> None:
    """Warnings and progress of the first process, errors of the others."""
    first = args.process_index == 0
    level = logging.WARNING if first else logging.ERROR
    logging.basicConfig(level=level)
    transformers.utils.logging.set_verbosity(level)
    datasets.utils.logging.set_verbosity(level)
    if not first:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def evaluate(trainer: ZOOTrainer, tokenizer: Any) -> dict[str, float]:
    """The Trainer's metrics, with those that follow from the loss, also written to `eval_results.json`."""
    metrics = trainer.evaluate()
    loss = metrics["eval_loss"]
    metrics["perplexity"] = perplexity(loss)
    metrics["bits_per_byte"] = bits_per_byte(loss, trainer.eval_dataset, tokenizer)
    trainer.log({"eval_bits_per_byte": metrics["bits_per_byte"]})  # for the trackers and the card
    trainer.save_metrics("eval", metrics)
    return metrics


def perplexity(loss: float) -> float:
    """e^loss, or infinity where that is no float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def run(model_args: ModelArguments, data_args: DataTrainingArguments, args: ZOOConfig) -> None:
    check(data_args, args)
    set_up_logging(args)
    if model_args.num_threads:
        torch.set_num_threads(model_args.num_threads)
    set_seed(args.seed)
    tokenizer = load_tokenizer(model_args)
    with args.main_process_first(desc="cutting the text into blocks"):
        blocks = load_blocks(data_args, model_args, tokenizer)
    model = load_model(model_args, tokenizer)
    if data_args.block_size > longest_context(model):
        raise Mistake(
            f"--block_size must be at most the model's {longest_context(model)}, not {data_args.block_size}."
        )
    trainer = make_trainer(
        model=model,
        args=args,
        train_dataset=blocks["train"] if args.do_train else None,
        eval_dataset=blocks["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=next_token_accuracy,
        preprocess_logits_for_metrics=likeliest_tokens,
        callbacks=[LossPlotCallback()] if args.do_train else [],
    )
    if trainer.is_world_process_zero():
        print(f"{trainer.model.num_parameters():,} weights. They write:\n\n{sample(trainer, tokenizer)}\n")
    if args.do_train:
        checkpoint: Any = args.resume_from_checkpoint
        result = trainer.train(resume_from_checkpoint=True if checkpoint == "last" else checkpoint)
        trainer.save_model(_internal_call=True)  # not pushed yet: that is done once, with the evaluation
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    finish(trainer, data_args, tokenizer, evaluate(trainer, tokenizer) if args.do_eval else {})


def main() -> None:
    try:
        run(*parse_arguments(sys.argv[1:]))
    except (Mistake, PushError) as mistake:
        print(f"{Path(sys.argv[0]).name}: error: {mistake}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
