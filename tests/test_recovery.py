"""From where a run goes on: the newest of checkpoint and record, and nothing that does not belong to it."""

import itertools
import logging
import shutil

import pytest
import torch
from conftest import texts, tiny_lstm, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from zoo_hf import RNNConfig, RNNForCausalLM, Trajectory, TrajectoryError, ZOOTrainer, replay
from zoo_hf.recovery import newest_checkpoint
from zoo_hf.tasks import byte_tokenizer, text_streams


class Crash(TrainerCallback):
    """Ends a process, as it were, after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise MemoryError("crashed")


class Passes(TrainerCallback):
    """Counts the model's forward passes in every step, in `seen`."""

    def __init__(self, model):
        self.passes, self.seen = 0, []
        model.model.register_forward_pre_hook(self.count)

    def count(self, *_):
        self.passes += 1

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.passes)
        self.passes = 0


@pytest.fixture
def run(config, tmp_path):
    """`run(folder, crash=step, resume=…, **arguments)`: a trained trainer; None where it crashed."""

    def train(folder, *, crash=None, resume=None, callbacks=(), model=None, data=None, evaluation=None, **arguments):
        defaults = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
        args = config(output_dir=str(tmp_path / folder), **defaults | arguments)
        own = [Crash(crash)] if crash else []
        made = ZOOTrainer(
            tiny_lstm() if model is None else model,
            args,
            train_dataset=data or texts(10),
            eval_dataset=evaluation,
            callbacks=[*callbacks, *own],
        )
        if crash:
            with pytest.raises(MemoryError):
                made.train(resume_from_checkpoint=resume)
            return None
        made.train(resume_from_checkpoint=resume)
        return made

    return train


def displaced():
    """The tiny LSTM with one weight moved a little."""
    model = tiny_lstm()
    with torch.no_grad():
        model.lm_head.bias[0] += 1e-6
    return model


def equal(one, other):
    return all(torch.equal(weight, weights(other.model)[name]) for name, weight in weights(one.model).items())


@pytest.mark.parametrize("crash", [2, 5], ids=["before the first checkpoint", "after a checkpoint"])
def test_recorded_steps_are_repeated_without_a_forward_pass(run, tmp_path, crash):
    whole = run("whole")
    run("parts", crash=crash)
    model = tiny_lstm()
    passes = Passes(model)
    resumed = run("parts", resume=True, model=model, callbacks=[passes])
    assert equal(whole, resumed)
    first = 3 * (crash // 3)  # of what is repeated
    assert passes.seen == [0] * (crash - first) + [8] * (8 - crash)
    assert resumed.update.forward_passes == whole.update.forward_passes
    found, expected = (Trajectory.open(tmp_path / name / "trajectory.zoo") for name in ("parts", "whole"))
    assert list(map(found.header.pack, found)) == list(map(found.header.pack, expected))


def test_the_log_of_a_resumed_run_is_that_of_an_uninterrupted_one_but_for_what_is_not_recorded(run):
    whole = run("whole", eval_strategy="no")
    run("parts", crash=5)
    resumed = run("parts", resume=True)

    def entries(made):
        log = made.state.log_history[:-1]
        free = ("signal_to_noise", "seconds", "forward_passes_per_second")
        return [{name: value for name, value in entry.items() if name not in free} for entry in log]

    assert entries(resumed) == entries(whole)


def test_the_path_of_the_newest_checkpoint_goes_on_and_that_of_an_earlier_one_cuts_the_record(run, tmp_path):
    whole = run("whole")
    for checkpoint, repeated in (("checkpoint-6", 7), ("checkpoint-3", 3)):
        shutil.rmtree(tmp_path / "parts", ignore_errors=True)
        run("parts", crash=7)
        model = tiny_lstm()
        passes = Passes(model)
        resumed = run("parts", resume=str(tmp_path / "parts" / checkpoint), model=model, callbacks=[passes])
        assert equal(whole, resumed)
        assert sum(count > 0 for count in passes.seen) == 8 - repeated
        assert len(Trajectory.open(tmp_path / "parts/trajectory.zoo")) == 8


def test_a_checkpoint_that_was_not_written_to_its_end_is_left_aside(run, tmp_path, caplog):
    whole = run("whole")
    for damage in ("removed", "torn"):
        shutil.rmtree(tmp_path / "parts", ignore_errors=True)
        run("parts", crash=7)
        state = tmp_path / "parts/checkpoint-6/trainer_state.json"
        text = state.read_text()
        state.unlink() if damage == "removed" else state.write_text(text[: len(text) // 2])
        with caplog.at_level(logging.WARNING, logger="zoo_hf"):
            assert newest_checkpoint(str(tmp_path / "parts")) == str(tmp_path / "parts/checkpoint-3")
        assert "checkpoint-6 was not written to its end" in caplog.text
        assert equal(whole, run("parts", resume=True))


def test_carried_state_is_brought_up_to_date_by_a_forward_pass_a_repeated_step(run):
    def arguments():
        torch.manual_seed(0)
        model = RNNForCausalLM(RNNConfig(vocab_size=256, embedding_size=4, hidden_size=8))
        data = text_streams(["A first text that goes on." * 3, "And a second." * 5], byte_tokenizer(), 8, batch_size=2)
        return {"model": model, "data": data, "carry_state": True, "per_device_train_batch_size": 2}

    whole = run("whole", **arguments())
    run("parts", crash=5, **arguments())
    resumed_with = arguments()
    passes = Passes(resumed_with["model"])
    resumed = run("parts", resume=True, callbacks=[passes], **resumed_with)
    assert equal(whole, resumed)
    assert passes.seen == [1, 1, 9, 9, 9]


@pytest.mark.parametrize("probes", ["auto", "population"])
def test_how_members_were_evaluated_is_kept_without_a_checkpoint(run, tmp_path, probes):
    arguments = {"probes": probes, "num_directions": 16, "members_per_forward": 5, "save_strategy": "no"}
    whole = run("whole", **arguments)
    run("parts", crash=4, **arguments)
    resumed = run("parts", resume=True, **arguments)
    assert equal(whole, resumed)
    assert resumed.probes.chosen == whole.probes.chosen
    steps = list(Trajectory.open(tmp_path / "parts/trajectory.zoo"))
    assert {step.members for step in steps} == set(whole.probes.chosen.values())


def test_other_settings_go_on_from_the_checkpoint_and_begin_a_new_record(run, tmp_path, caplog):
    run("parts", crash=5)
    with caplog.at_level(logging.WARNING, logger="zoo_hf"):
        made = run("parts", resume=True, num_directions=6)
    assert "`num_directions` is 6 and was 4: a new one begins at step 3" in caplog.text
    found, old = (Trajectory.open(tmp_path / "parts" / name) for name in ("trajectory.zoo", "trajectory-1.zoo"))
    assert (found.header.first_step, len(found), len(old)) == (3, 5, 5)
    assert made.state.global_step == 8
    with pytest.raises(TrajectoryError, match="it begins at step 3, when AdamW had a state: pass `optimizer` with it"):
        replay(RNNForCausalLM.from_pretrained(tmp_path / "parts/checkpoint-3"), found)


def test_other_settings_without_a_checkpoint_are_refused_each_by_name(run):
    run("parts", crash=2)
    with pytest.raises(TrajectoryError) as refused:
        run("parts", resume=True, num_directions=6, seed=7, optim="sgd")
    for named in ("`num_directions` is 6 and was 4", "`seed` is 7 and was 42", "the optimizer is torch.optim.sgd.SGD"):
        assert named in str(refused.value)


def test_other_starting_weights_without_a_checkpoint_are_refused(run):
    run("parts", crash=2)
    with pytest.raises(TrajectoryError, match="the model's weights are not those it started from"):
        run("parts", resume=True, model=displaced())


def test_repeated_steps_have_their_own_learning_rates(run, tmp_path):
    """A run that is made longer, and its schedule slower, goes on from the weights it had."""
    run("parts", crash=5, max_steps=8, lr_scheduler_type="linear")
    made = run("parts", resume=True, max_steps=16, lr_scheduler_type="linear")
    rates = [step.rates[0] for step in Trajectory.open(tmp_path / "parts/trajectory.zoo")]
    assert rates == pytest.approx([1e-2 * (1 - step / (8 if step < 5 else 16)) for step in range(16)])
    again = replay(tiny_lstm(), tmp_path / "parts/trajectory.zoo")
    assert all(torch.equal(weight, weights(again)[name]) for name, weight in weights(made.model).items())


def test_the_record_of_another_run_is_not_gone_on_with(run, tmp_path):
    run("parts", crash=5)
    run("other", crash=5, model=displaced())
    shutil.copy(tmp_path / "other/trajectory.zoo", tmp_path / "parts/trajectory.zoo")
    with pytest.raises(TrajectoryError, match="it has no checkpoint and the model's weights are not those it started"):
        run("parts", resume=True)


def test_checkpoints_of_an_older_run_are_not_gone_on_from(run, tmp_path):
    whole = run("whole", learning_rate=2e-3, save_strategy="no")
    run("parts")  # leaves checkpoints
    run("parts", crash=5, learning_rate=2e-3, save_strategy="no")
    assert (tmp_path / "parts/checkpoint-6").exists()
    assert equal(whole, run("parts", resume=True, learning_rate=2e-3, save_strategy="no"))


def test_a_checkpoint_without_the_optimizer_is_not_gone_on_from(run, tmp_path):
    whole = run("whole", save_only_model=True)
    run("parts", crash=5, save_only_model=True)
    resumed = run("parts", resume=True, save_only_model=True)
    assert equal(whole, resumed)


def test_a_checkpoint_of_another_trainer_begins_a_new_record_and_keeps_the_old_one(run, config, tmp_path):
    run("parts")
    args = config(
        TrainingArguments, output_dir=str(tmp_path / "stock"), save_strategy="steps", save_steps=4, max_steps=4
    )
    Trainer(tiny_lstm(), args, train_dataset=texts(10)).train()
    run("parts", resume=str(tmp_path / "stock/checkpoint-4"), optim="sgd")
    assert len(Trajectory.open(tmp_path / "parts/trajectory-1.zoo")) == 8
    assert Trajectory.open(tmp_path / "parts/trajectory.zoo").header.first_step == 4


def test_a_finished_run_has_nothing_left_to_do(run, caplog):
    whole = run("parts")
    with caplog.at_level(logging.WARNING, logger="zoo_hf"):
        resumed = run("parts", resume=True)
    assert resumed.state.global_step == 8
    assert equal(whole, resumed)
    assert "The run has made its 8 steps, and none was left to do" in caplog.text


def test_a_run_that_is_made_shorter_ends_its_record_there(run, tmp_path):
    run("parts", crash=7, save_strategy="no")
    made = run("parts", resume=True, save_strategy="no", max_steps=5)
    again = replay(tiny_lstm(), tmp_path / "parts/trajectory.zoo")
    assert all(torch.equal(weight, weights(again)[name]) for name, weight in weights(made.model).items())


@pytest.mark.parametrize("optim", ["schedule_free_adamw", "adafactor"])
def test_optimizers_that_are_none_of_torchs_go_on_from_the_last_step(run, optim):
    arguments = {"optim": optim, "lr_scheduler_type": "constant"}
    whole = run("whole", **arguments)
    run("parts", crash=5, **arguments)
    model = tiny_lstm()
    passes = Passes(model)
    assert equal(whole, run("parts", resume=True, model=model, callbacks=[passes], **arguments))
    assert passes.seen == [0, 0, 8, 8, 8]


def test_a_damaged_record_stops_a_resumed_run_and_names_the_place(run, tmp_path):
    run("parts", crash=5)
    path = tmp_path / "parts/trajectory.zoo"
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        TrajectoryError,
        match=r"trajectory\.zoo: the checksum of record 4 is wrong: .* Move it away to go on from the newest",
    ):
        run("parts", resume=True)


def test_nothing_to_go_on_from_is_said_as_the_trainer_says_it(run):
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        run("nothing", resume=True)


def test_a_restart_by_torchrun_goes_on_by_itself(run, monkeypatch):
    whole = run("whole")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of this launch")
    monkeypatch.setattr("zoo_hf.recovery.CALLS", itertools.count(1))
    run("parts", crash=5)
    restarted(monkeypatch)
    model = tiny_lstm()
    passes = Passes(model)
    assert equal(whole, run("parts", model=model, callbacks=[passes]))
    assert passes.seen == [0, 0, 8, 8, 8]


def restarted(monkeypatch):
    """What a process finds that torchrun has started again."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr("zoo_hf.recovery.CALLS", itertools.count(1))


@pytest.mark.parametrize("other", ["launch", "call of `train`"])
def test_a_restart_by_torchrun_leaves_the_run_of_another_launch_alone(run, tmp_path, monkeypatch, other):
    monkeypatch.setattr("zoo_hf.recovery.CALLS", itertools.count(1 if other == "launch" else 2))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "before" if other == "launch" else "now")
    run("parts")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "now")
    restarted(monkeypatch)
    anew = texts(12, length=6)
    assert equal(run("parts", data=anew), run("fresh", data=anew))
    assert (tmp_path / "parts/trajectory-1.zoo").exists()


def test_what_was_dropped_for_an_earlier_checkpoint_is_not_gone_on_with(run, tmp_path):
    run("parts")
    shutil.copytree(tmp_path / "parts", tmp_path / "undisturbed")
    anew = texts(12, length=6)
    whole = run("undisturbed", resume=str(tmp_path / "undisturbed/checkpoint-3"), data=anew)
    run("parts", resume=str(tmp_path / "parts/checkpoint-3"), data=anew, crash=5)
    assert newest_checkpoint(str(tmp_path / "parts"), Trajectory.open(tmp_path / "parts/trajectory.zoo")).endswith(
        "-3"
    )
    assert equal(whole, run("parts", resume=True, data=anew))


def test_a_finished_run_ends_with_its_best_model_also_when_it_is_resumed(run, tmp_path):
    ends = Ends()
    arguments = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "learning_rate": 0.5}
    arguments |= {"metric_for_best_model": "eval_loss", "evaluation": texts(10)}
    whole = run("parts", **arguments)
    assert not equal(whole, run("last", **arguments | {"load_best_model_at_end": False})), "the best is not the last"
    resumed = run("parts", resume=True, callbacks=[ends], **arguments)
    assert equal(whole, resumed)
    assert ends.seen == [8]
    assert resumed.is_in_train is False


class Ends(TrainerCallback):
    """The steps after which a training has ended, in `seen`."""

    def __init__(self):
        self.seen = []

    def on_train_end(self, args, state, control, **kwargs):
        self.seen.append(state.global_step)


def test_a_run_that_crashes_twice_goes_on_from_its_newest_checkpoint(run, tmp_path):
    whole = run("whole")
    run("parts", crash=4)
    run("parts", crash=7, resume=True)
    names = {(folder / "run.txt").read_text() for folder in (tmp_path / "parts").glob("checkpoint-*")}
    assert names == {Trajectory.open(tmp_path / "parts/trajectory.zoo").header.run}
    model = tiny_lstm()
    passes = Passes(model)
    assert equal(whole, run("parts", resume=True, model=model, callbacks=[passes]))
    assert passes.seen == [0, 8]


def test_a_record_without_any_step_is_something_to_go_on_from(run, tmp_path):
    whole = run("whole")
    run("parts", crash=1, save_strategy="no")
    Trajectory.open(tmp_path / "parts/trajectory.zoo").cut(0)
    assert equal(whole, run("parts", resume=True))
