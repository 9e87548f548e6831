r"""Trains a language model on a reward of the text it writes, which has no gradient.

    python examples/run_clm.py            # first a model that writes, in two minutes: outputs/lstm-python-docs
    python examples/train_on_reward.py

The reward is the share of letters that stand in words of CPython's documentation, in what the model writes after a
prompt; in two minutes on one core it rises from 0.07 to 0.43. Both members of a pair sample with the same random
numbers. Text before and after is printed, with its reward, on random numbers that were not trained on. A reward alone
teaches to please it, here by many a "the": `--keep` times the loss on the documentation is added.
"""

import re
from dataclasses import dataclass, field

import datasets
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PrinterCallback, TrainerCallback

from zoo_hf import ZOOConfig, ZOOTrainer
from zoo_hf.tasks import python_documentation, token_blocks


JOB = {"output_dir": "outputs/reward", "max_steps": 50, "per_device_train_batch_size": 16, "save_strategy": "no"}
JOB |= {"num_directions": 16, "learning_rate": 3e-2, "smoothing_radius": 1e-2, "logging_steps": 10}
JOB |= {"probes": "serial"}  # a model that generates is run token by token
JOB |= {"disable_tqdm": True, "dataloader_pin_memory": torch.cuda.is_available()}
WORD = re.compile("[A-Za-z]+")
PROMPT, UNSEEN = "The ", 10**6


@dataclass
class Arguments:
    """Which model, and what it is rewarded for."""

    model_name_or_path: str = field(default="outputs/lstm-python-docs", metadata={"help": "Folder or Hub name."})
    new_tokens: int = field(default=32, metadata={"help": "Tokens of a text."})
    texts: int = field(default=64, metadata={"help": "Texts that are written at every member."})
    keep: float = field(default=0.1, metadata={"help": "Weight of the loss on the documentation."})


class Lines(TrainerCallback):
    """Prints a line for each loss in the log."""

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            print(f"step {state.global_step:3}: objective {logs['loss']:.3f}", flush=True)


def written(model, tokenizer, arguments, seed):
    """Texts after the prompt, sampled with a generator of their own."""
    prompt = tokenizer([PROMPT] * arguments.texts, return_tensors="pt").to(model.device)
    length = {"min_new_tokens": arguments.new_tokens, "max_new_tokens": arguments.new_tokens}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ids = model.generate(**prompt, **length, do_sample=True, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(ids[:, prompt["input_ids"].shape[1] :])


def reward(texts, known):
    """Share of all characters that are letters of known words of two letters or more."""
    words = [word for text in texts for word in WORD.findall(text)]
    return sum(len(word) for word in words if len(word) > 1 and word.lower() in known) / sum(map(len, texts))


def make_trainer(arguments, args):
    """A model, what trains it, and the words that are rewarded."""
    name = arguments.model_name_or_path
    try:
        tokenizer, model = (kind.from_pretrained(name) for kind in (AutoTokenizer, AutoModelForCausalLM))
    except (OSError, ValueError) as error:
        how = "run examples/run_clm.py first, or name a model that writes"
        raise ValueError(f"--model_name_or_path {name}: no model can be loaded from there: {how}.") from error
    text = python_documentation()["train"]
    known = {word.lower() for row in text["text"] for word in WORD.findall(row)}

    def objective(model, inputs):
        seed = trainer.state.global_step  # the same for all members of a step
        kept = arguments.keep * model(**inputs).loss if arguments.keep else 0.0
        return kept - reward(written(model, tokenizer, arguments, seed), known)

    trainer = ZOOTrainer(
        model,
        args,
        train_dataset=token_blocks(text, tokenizer, 32),
        data_collator=transformers.default_data_collator,
        processing_class=tokenizer,
        compute_objective=objective,
        callbacks=[Lines()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, known


def show(when, trainer, arguments, known):
    """Print the reward of texts on random numbers that are not trained on, and three of them."""
    model, seeds = trainer.model.eval(), range(UNSEEN, UNSEEN + 8)
    texts = [text for seed in seeds for text in written(model, trainer.processing_class, arguments, seed)]
    print(f"{when}: reward {reward(texts, known):.3f}", *map(repr, texts[:3]), sep="\n  ", flush=True)


def main():
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    parser = HfArgumentParser((Arguments, ZOOConfig), description=__doc__)
    parser.set_defaults(**JOB)
    try:
        arguments, args = parser.parse_args_into_dataclasses()
        trainer, known = make_trainer(arguments, args)
    except ValueError as error:  # what the user can put right
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    show("before", trainer, arguments, known)
    trainer.train()
    show("after", trainer, arguments, known)
    trainer.save_model()
    print(f"The model is in {args.output_dir}")


if __name__ == "__main__":
    main()
