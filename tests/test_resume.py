"""Stopped and resumed equals uninterrupted, bit for bit; what fails in the midst of a step leaves θ as it was."""

import logging

import pytest
import torch
from conftest import texts, tiny_lstm, weights
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from zoo_hf import ZOOTrainer
from zoo_hf.config import settings


class Stop(TrainerCallback):
    """Ends a run after a step, as if the machine were taken away."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def with_dropout() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.3, bos_token_id=0, eos_token_id=0))


def corrupt(examples):
    """Batches with a random half of the tokens hidden, by torch's generator."""
    tokens = torch.stack([example["input_ids"] for example in examples])
    return {"input_ids": tokens.where(torch.rand(tokens.shape) < 0.5, 0), "labels": tokens}


ADAMW = {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "weight_decay": 0.1}
MOMENTUM = {"optim": "sgd", "optim_args": "momentum=0.9", "lr_scheduler_type": "linear", "warmup_steps": 3}


@pytest.mark.parametrize(
    ("model", "step", "arguments"),
    [
        (tiny_lstm, 4, ADAMW),
        (tiny_lstm, 3, ADAMW | {"data_collator": corrupt}),
        (tiny_lstm, 4, ADAMW | {"data_collator": corrupt}),
        (tiny_lstm, 2, ADAMW | {"data_collator": corrupt, "dataloader_num_workers": 2}),
        (tiny_lstm, 4, MOMENTUM),
        (tiny_lstm, 4, ADAMW | {"optim": "adafactor", "estimator": "forward"}),
        (tiny_lstm, 4, ADAMW | {"optim": "schedule_free_sgd", "lr_scheduler_type": "constant", "warmup_steps": 1}),
        (tiny_lstm, 2, ADAMW | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
        (with_dropout, 4, ADAMW | {"dropout": True}),
        (tiny_lstm, 4, ADAMW | {"bf16": True, "max_grad_norm": 1.0}),
    ],
    ids=[
        "mid-epoch",
        "random",
        "random, mid-epoch",
        "random, workers",
        "momentum",
        "adafactor",
        "schedule-free",
        "accumulated",
        "dropout",
        "bf16",
    ],
)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(config, tmp_path, model, step, arguments):
    arguments = dict(arguments)
    collator = {"data_collator": arguments.pop("data_collator", None)}

    def run(folder, *callbacks, resume=None):
        args = config(
            output_dir=str(tmp_path / folder),
            save_strategy="steps",
            save_steps=step,
            **{"max_steps": -1, "num_train_epochs": 2, "learning_rate": 1e-2} | arguments,
        )
        # three updates an epoch, the last of them ragged
        made = ZOOTrainer(model(), args, train_dataset=texts(10), callbacks=list(callbacks), **collator)
        made.train(resume_from_checkpoint=resume)
        return made

    whole = run("whole")
    run("parts", Stop(step))
    resumed = run("parts", resume=True)
    assert resumed.state.global_step == whole.state.global_step == 6
    assert resumed.update.forward_passes == whole.update.forward_passes
    for name, weight in weights(whole.model).items():
        assert torch.equal(weight, weights(resumed.model)[name]), name
    of_the_clock = {"forward_passes_per_second", "seconds"}
    entries = [{k: e[k] for k in e.keys() - of_the_clock} for e in whole.state.log_history[:-1]]
    again = [{k: e[k] for k in e.keys() - of_the_clock} for e in resumed.state.log_history[:-1]]
    assert entries == again


OTHER = {
    "num_directions": (4, 6),
    "smoothing_radius": (1e-2, 2e-2),
    "estimator": ("central", "forward"),
    "distribution": ("rademacher", "low_rank"),
    "direction_rank": (1, 2),
    "normalize": ("none", "loss_std"),
    "probes": ("serial", "population"),
    "members_per_forward": (None, 4),
    "dropout": (False, True),
    "carry_state": (False, True),
    "data": ("shared", "split"),
    "seed": (42, 7),
    "max_grad_norm": (0.0, 0.5),
}


@pytest.mark.parametrize(
    "names", [[], [name for name in OTHER if name != "data"], ["data"]], ids=["none", "all", "one"]
)
def test_resuming_with_other_fields_names_each_with_both_values(config, tmp_path, caplog, names):
    def run(**arguments):
        args = config(save_strategy="steps", save_steps=1, **arguments)
        return ZOOTrainer(tiny_lstm(), args, train_dataset=texts(10))

    run(max_steps=1).train()
    made = run(max_steps=2, **{name: OTHER[name][1] for name in names})
    assert OTHER.keys() == settings(made.args).keys()
    with caplog.at_level(logging.WARNING, logger="zoo_hf"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    lines = [record.message for record in caplog.records if record.name == "zoo_hf.update"]
    assert len(lines) == len(names)
    for name in names:
        then, now = OTHER[name]
        (line,) = (line for line in lines if line.startswith(f"`{name}` is {now!r} now and was {then!r} when"))
        assert f"Set `{name}`={then!r}" in line
    assert made.state.global_step == 2


def test_a_second_run_of_a_trainer_saves_the_fields_it_ran_with(config, tmp_path):
    made = ZOOTrainer(tiny_lstm(), config(save_strategy="steps", save_steps=2), train_dataset=texts(10))
    made.train()
    made.args.num_directions = 6
    made.train()
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert saved["zoo"]["num_directions"] == 6


def test_a_checkpoint_of_the_model_only_holds_the_weights_and_starts_a_new_count(config, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True, "optim": "sgd"}
    made = ZOOTrainer(tiny_lstm(), config(**arguments), train_dataset=texts(10))
    made.train()
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"model.safetensors", "trainer_state.json"} <= names
    assert not {"optimizer.pt", "scheduler.pt"} & names
    args = config(**arguments | {"max_steps": 3})
    resumed = ZOOTrainer(tiny_lstm(), args, train_dataset=texts(10))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    whole = ZOOTrainer(tiny_lstm(), config(max_steps=3, optim="sgd"), train_dataset=texts(10))
    whole.train()
    for name, weight in weights(whole.model).items():  # plain SGD at a constant rate has no state but θ
        assert torch.equal(weight, weights(resumed.model)[name]), name
    assert resumed.update.forward_passes == whole.update.forward_passes // 3


class Crowded(ZOOTrainer):
    """Runs out of memory at one probe, as long as the batch has more than six sequences."""

    def __init__(self, *args, fails_at, **kwargs):
        self.calls, self.fails_at, self.seen = 0, fails_at, []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, **kwargs):
        self.calls += 1
        if len(inputs["input_ids"]) > 6 and self.calls == self.fails_at:
            self.seen.append(weights(model))
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(model, inputs, **kwargs)


def test_a_smaller_batch_is_tried_when_memory_ends_in_the_midst_of_a_pair(config):
    arguments = {"max_steps": 3, "save_strategy": "no", "optim": "sgd"}
    start, model = weights(tiny_lstm()), tiny_lstm()
    args = config(**arguments, auto_find_batch_size=True, per_device_train_batch_size=8)
    made = Crowded(model, args, train_dataset=texts(24), fails_at=6)  # the second member of the third pair

    at_start = []

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            at_start.append((made._train_batch_size, weights(model)))

    made.add_callback(Begin())
    made.train()
    assert all(not torch.equal(made.seen[0][name], start[name]) for name in start)
    (first, _), (second, found) = at_start
    assert (first, second) == (8, 7)
    assert all(torch.equal(found[name], start[name]) for name in start)
    other = tiny_lstm()
    ZOOTrainer(other, config(**arguments, per_device_train_batch_size=7), train_dataset=texts(24)).train()
    assert all(torch.equal(weight, weights(other)[name]) for name, weight in weights(model).items())
