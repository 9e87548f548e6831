r"""Fine-tunes a pretrained language model for sentiment, by forward passes alone, as MeZO does with label words.

    python examples/finetune_sentiment.py --train_file reviews.csv

A review stands in a prompt, and the model's scores of " negative" and " positive" after it are the answer. The file
has columns `text` and `label` (0, 1); without it, Rotten Tomatoes comes from the Hub. `--method` trains an adapter of
PEFT (lora) or all weights (full), `--objective` minimises the cross-entropy, or what has no gradient: the error rate,
or 1 − F1. Accuracy on held-out reviews with its standard error is printed and saved in `sentiment_results.json`.
"""

import math
import resource
import time
from dataclasses import dataclass, field
from typing import Literal

import datasets
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithPadding, HfArgumentParser

from zoo_hf import ZOOConfig, ZOOTrainer


MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT, WORDS, LENGTH = "Review: {}\nSentiment:", (" negative", " positive"), 96
JOB = {"lora": {"max_steps": 2400, "num_directions": 1, "learning_rate": 2e-3, "smoothing_radius": 1e-2}}
JOB["full"] = {"max_steps": 300, "num_directions": 4, "learning_rate": 5e-5, "smoothing_radius": 1e-3, "optim": "sgd"}
SHARED = {"output_dir": "outputs/sentiment", "logging_steps": 50, "save_strategy": "no"}
SHARED |= {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 32, "remove_unused_columns": False}
SHARED |= {"train_sampling_strategy": "group_by_length", "dataloader_pin_memory": torch.cuda.is_available()}


@dataclass
class Arguments:
    model_name_or_path: str = field(default=MODEL, metadata={"help": "Causal language model: Hub name or folder."})
    train_file: str | None = field(default=None, metadata={"help": "CSV with columns text and label (0 or 1)."})
    method: Literal["lora", "full"] = field(default="lora", metadata={"help": "What is trained: adapter or weights."})
    objective: Literal["loss", "error", "f1"] = field(default="loss", metadata={"help": "What is minimised."})
    dtype: str = field(default="float32", metadata={"help": "Of the model's weights: float32 or bfloat16."})
    held_out: int = field(default=1000, metadata={"help": "Reviews that are held out."})


def answers(model, inputs):
    """Scores of the two words after each prompt, (B, 2)."""
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}  # padded on the left
    last = model.get_decoder()(**texts, use_cache=False).last_hidden_state[:, -1].float()
    return last @ model.get_output_embeddings().weight[inputs["words"][0]].float().T  # the model's own: bfloat16


def loss(model, inputs):
    return torch.nn.functional.cross_entropy(answers(model, inputs), inputs["labels"])


def error(model, inputs):
    return (answers(model, inputs).argmax(1) != inputs["labels"]).double().mean()


def f1(model, inputs):
    """1 − F1 of the positive reviews, 1 − 2 TP/(2 TP + FP + FN)."""
    said, labels = answers(model, inputs).argmax(1), inputs["labels"]
    return 1 - 2 * (said * labels).sum() / (said + labels).sum().clamp(min=1)


@torch.inference_mode()
def accuracy(trainer, when):
    """Share p of the N held-out reviews that are judged right, and its standard error √(p (1 − p)/N)."""
    batches, model = map(trainer._prepare_inputs, trainer.get_eval_dataloader()), trainer.model.eval()
    wrong = torch.cat([answers(model, batch).argmax(1) != batch["labels"] for batch in batches])
    p = 1 - wrong.double().mean().item()
    return {f"accuracy_{when}": p, f"standard_error_{when}": math.sqrt(p * (1 - p) / len(wrong))}


def reviews(arguments, tokenizer):
    """Prompts as tokens: to train on, and held out, the same ones whatever the run's seed."""
    file, held_out = arguments.train_file, arguments.held_out
    words = [tokenizer.encode(word, add_special_tokens=False)[0] for word in WORDS]

    def encode(row):
        ids = tokenizer(row["text"].strip(), truncation=True, max_length=LENGTH, add_special_tokens=False)["input_ids"]
        return dict(tokenizer(PROMPT.format(tokenizer.decode(ids)))) | {"labels": int(row["label"]), "words": words}

    rows = datasets.load_dataset("csv" if file else "rotten_tomatoes", data_files=file, split="train").shuffle(seed=0)
    if not {"text", "label"} <= set(rows.column_names) or not set(rows["label"]) <= {0, 1}:
        raise ValueError(f"--train_file {file}: give it columns `text` and `label`, and only 0 and 1 as labels.")
    if not 0 < held_out < len(rows):
        raise ValueError(f"--held_out must be above 0 and below the {len(rows)} reviews there are, got {held_out}.")
    rows = rows.map(encode, remove_columns=rows.column_names)
    return {"train_dataset": rows.skip(held_out), "eval_dataset": rows.take(held_out)}


def main():
    parser = HfArgumentParser((Arguments, ZOOConfig), description=__doc__)
    parser.set_defaults(**SHARED | JOB[parser.parse_known_args()[0].method])
    try:
        arguments, args = parser.parse_args_into_dataclasses()
        try:
            tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path, padding_side="left")
            model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, dtype=arguments.dtype)
        except OSError as mistake:
            raise OSError(f"--model_name_or_path {arguments.model_name_or_path}: {mistake}") from mistake
        if arguments.method == "lora":
            torch.manual_seed(args.seed)
            model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        objective = {"loss": loss, "error": error, "f1": f1}[arguments.objective]
        data = reviews(arguments, tokenizer) | {"compute_objective": objective}
        trainer = ZOOTrainer(model, args, DataCollatorWithPadding(tokenizer), **data)
    except (OSError, ValueError) as mistake:  # what the user can put right: a file, a model's name, an argument
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(mistake).split())}\n")
    results, start = accuracy(trainer, "before"), time.perf_counter()
    trainer.train()
    results |= {"minutes": (time.perf_counter() - start) / 60} | accuracy(trainer, "after")
    results["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    trainer.log_metrics("sentiment", results)
    trainer.save_metrics("sentiment", results)
    trainer.save_model()


if __name__ == "__main__":
    main()
