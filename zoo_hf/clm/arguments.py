"""Which model is trained on which text, as arguments of a command line. Those of the run itself are `ZOOConfig`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .mistake import Mistake


LOADERS = {".txt": "text", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


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
