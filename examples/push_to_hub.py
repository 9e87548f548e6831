r"""Trains a small model, publishes it with its card, and loads it from the Hub as anybody would.

    hf auth login
    python examples/push_to_hub.py --hub_model_id me/tiny-lstm

What arrives: weights, tokenizer, the model's code, a card with its plot and table, and the trajectory. Whoever loads
it needs transformers alone. `--trajectory_only` publishes the record of the run in place of weights: a repository of
kilobytes from which `load_from_trajectory` makes the weights. HF_ENDPOINT chooses another Hub.
"""

from dataclasses import dataclass, field

import datasets
import torch
import transformers
from transformers import HfArgumentParser, PrinterCallback, TrainerCallback, default_data_collator, pipeline, set_seed

from zoo_hf import PushError, RNNConfig, RNNForCausalLM, ZOOConfig, ZOOTrainer, load_from_trajectory
from zoo_hf.callbacks import DrawingError, LossPlotCallback
from zoo_hf.tasks import byte_tokenizer, python_documentation, token_blocks


JOB = {
    "output_dir": "outputs/pushed",
    "max_steps": 200,
    "per_device_train_batch_size": 16,
    "logging_steps": 50,
    "disable_tqdm": True,
    "dataloader_pin_memory": torch.cuda.is_available(),
}


@dataclass
class Arguments:
    """How it is published."""

    trajectory_only: bool = field(default=False, metadata={"help": "Publish the record of the run, no weights."})


class Lines(TrainerCallback):
    """Prints a line for each loss in the log."""

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            print(f"step {state.global_step:4}: loss {logs['loss']:.3f}", flush=True)


def make_trainer(args):
    """A new model, Python's documentation, and what trains and pushes it."""
    if args.hub_model_id is None:
        raise ValueError("--hub_model_id is missing: say where to publish, as in --hub_model_id your-name/repository.")
    tokenizer = byte_tokenizer()
    set_seed(args.seed)  # a trajectory alone has the seed, from which the starting weights are made again
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = RNNConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ends)
    trainer = ZOOTrainer(
        RNNForCausalLM(config),
        args,
        train_dataset=token_blocks(python_documentation(), tokenizer, 32)["train"],
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=[LossPlotCallback(), Lines()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def main():
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    parser = HfArgumentParser((Arguments, ZOOConfig), description=__doc__)
    parser.set_defaults(**JOB)
    try:
        arguments, args = parser.parse_args_into_dataclasses()
        trainer = make_trainer(args)
        trainer.train()
        if arguments.trajectory_only:
            trainer.push_trajectory_to_hub(args.hub_model_id, dataset="CPython's documentation")
            model = load_from_trajectory(args.hub_model_id)
        else:
            trainer.push_to_hub(dataset="CPython's documentation")
            model = args.hub_model_id
    except (ValueError, PushError, DrawingError) as error:  # what the user can put right
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"published as {args.hub_model_id}. Loaded from there, it writes:\n")
    # the import of zoo_hf made its models known; without it: trust_remote_code=True
    write = pipeline("text-generation", model, tokenizer=trainer.processing_class)
    print(write("The ", max_new_tokens=60, do_sample=True)[0]["generated_text"])


if __name__ == "__main__":
    main()
