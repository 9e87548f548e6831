"""A run: the trainer is made of its arguments, trains, and is evaluated."""

import logging
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import default_data_collator, set_seed

from ..callbacks import LossPlotCallback
from ..config import ZOOConfig
from ..tasks import bits_per_byte, likeliest_tokens, next_token_accuracy, perplexity
from ..trainer import ZOOTrainer
from .arguments import DataTrainingArguments, ModelArguments
from .command_line import check
from .mistake import Mistake
from .model import load_model, load_tokenizer, longest_context
from .sampling import written
from .text import load_blocks


PROMPT, SAMPLE_TOKENS = "The ", 200
FIGURES = {
    "eval_loss": "validation loss (nats a token)",
    "eval_accuracy": "share of next tokens guessed",
    "perplexity": "perplexity",
    "bits_per_byte": "bits a byte",
}


def run(model_args: ModelArguments, data_args: DataTrainingArguments, args: ZOOConfig) -> None:
    """Train and evaluate, as far as the arguments say, and leave a model with its card."""
    check(data_args, args)
    trainer = make_trainer(model_args, data_args, args)
    if trainer.is_world_process_zero():
        print(f"{trainer.model.num_parameters():,} weights. They write:\n\n{sample(trainer)}\n")
    if args.do_train:
        checkpoint: Any = args.resume_from_checkpoint
        result = trainer.train(resume_from_checkpoint=True if checkpoint == "last" else checkpoint)
        trainer.save_model(_internal_call=True)  # not pushed yet: that is done once, with the evaluation
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    finish(trainer, data_args, evaluate(trainer) if args.do_eval else {})


def make_trainer(model_args: ModelArguments, data_args: DataTrainingArguments, args: ZOOConfig) -> Any:
    """The `ZOOTrainer` of a model on blocks of a text; what it refuses is the user's mistake."""
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
    try:
        return ZOOTrainer(
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


def sample(trainer: Any) -> str:
    """What the model writes after `PROMPT`."""
    model, tokenizer = trainer.model, trainer.processing_class
    tokens = int(min(SAMPLE_TOKENS, longest_context(model) - len(tokenizer(PROMPT)["input_ids"])))
    return written(model, tokenizer, PROMPT, tokens, seed=trainer.args.seed, min_new_tokens=tokens)


def evaluate(trainer: Any) -> dict[str, float]:
    """The Trainer's metrics, with those that follow from the loss, also written to `eval_results.json`."""
    metrics = trainer.evaluate()
    loss = metrics["eval_loss"]
    metrics["perplexity"] = perplexity(loss)
    metrics["bits_per_byte"] = bits_per_byte(loss, trainer.eval_dataset, trainer.processing_class)
    trainer.log({"eval_bits_per_byte": metrics["bits_per_byte"]})  # for the trackers and the card
    trainer.save_metrics("eval", metrics)
    return metrics


def finish(trainer: Any, data_args: DataTrainingArguments, metrics: dict[str, float]) -> None:
    """Say what came out and where it is, and write or push the card."""
    args = trainer.args
    if trainer.is_world_process_zero():
        print(f"\nIt writes now:\n\n{sample(trainer)}\n")
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
