"""What a trainer pushes arrives, loads elsewhere and can be gone on with; what goes wrong is said, at no loss."""

import logging
import os
import pickle
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import texts, tiny_lstm, weights
from huggingface_hub import HfApi, snapshot_download
from local_hub_storage import LARGE_SUFFIXES
from test_trainer import Quadratic, points
from transformers import AutoModelForCausalLM, TrainerCallback, pipeline

from zoo_hf import PushError, Trajectory
from zoo_hf.pushing import Token
from zoo_hf.tasks.text import byte_tokenizer

from .conftest import environment


REPOSITORY = "tester/lstm"
MODEL = {"config.json", "generation_config.json", "model.safetensors", "modeling_rnn.py", "configuration_rnn.py"}
RUN = {"README.md", "training_args.bin", "trajectory.zoo"}


@pytest.fixture
def pushing(trainer, tmp_path):
    """A trainer of an LSTM that pushes to the Hub, in a folder of its own."""

    def make(steps=2, *, folder="run", keywords=(), **arguments):
        own = {"push_to_hub": True, "hub_model_id": REPOSITORY, "save_strategy": "steps", "save_steps": 1}
        arguments = own | {"hub_always_push": True, "max_steps": steps} | arguments
        return trainer(tiny_lstm(), texts(8), keywords, output_dir=str(tmp_path / folder), **arguments)

    return make


def test_the_model_its_code_its_card_and_its_run_arrive(hub, pushing, tmp_path):
    made = pushing(hub_strategy="end")
    made.train()
    made.push_to_hub(dataset="random tokens", license="mit")
    files = hub.files(REPOSITORY)
    assert files.keys() >= MODEL | RUN
    assert not [name for name in files if name.startswith("checkpoint")]
    card = files["README.md"].decode()
    assert f'from_pretrained("{REPOSITORY}")' in card
    assert "license: mit" in card
    assert "on random tokens without backpropagation" in card
    assert f"zoo-hf replay {REPOSITORY} replayed" in card
    assert files["trajectory.zoo"] == (tmp_path / "run/trajectory.zoo").read_bytes()
    info = HfApi().model_info(REPOSITORY)
    assert (info.pipeline_tag, info.library_name) == ("text-generation", "transformers")
    assert {"zoo_hf", "zeroth-order", "rnn"} <= set(info.tags)


def test_a_model_that_is_not_of_transformers_is_pushed_with_a_card(hub, trainer, tmp_path):
    made = trainer(Quadratic(), points(4), output_dir=str(tmp_path / "run"), hub_model_id=REPOSITORY)
    made.train()
    made.push_to_hub()
    files = hub.files(REPOSITORY)
    assert files.keys() == {".gitattributes", "model.safetensors"} | RUN | {"zoo_run.json"}
    assert f'load_model(model, hf_hub_download("{REPOSITORY}", "model.safetensors"))' in files["README.md"].decode()


@pytest.mark.parametrize(
    ("strategy", "folders", "during"),
    [
        ("end", set(), False),
        ("every_save", set(), True),
        ("checkpoint", {"last-checkpoint"}, True),
        ("all_checkpoints", {"checkpoint-1", "checkpoint-2"}, True),
    ],
)
def test_every_strategy_pushes_what_it_says(hub, pushing, strategy, folders, during):
    made = pushing(hub_strategy=strategy)
    made.train()
    assert (hub.files(REPOSITORY).keys() >= MODEL | RUN) == during
    made.push_to_hub()
    files = hub.files(REPOSITORY)
    assert {name.split("/")[0] for name in files if "/" in name} == folders
    assert all(f"{folder}/{name}" in files for folder in folders for name in ("optimizer.pt", "run.txt"))
    assert files.keys() >= MODEL | RUN


@pytest.mark.parametrize("resume", [True, "last-checkpoint"], ids=["newest", "path"])
def test_a_run_goes_on_from_its_last_checkpoint_on_the_hub(hub, pushing, tmp_path, resume):
    whole = pushing(4, folder="whole", push_to_hub=False, optim="adamw_torch")
    whole.train()
    pushing(4, hub_strategy="checkpoint", optim="adamw_torch", keywords=[("callbacks", [Stop(3)])]).train()
    elsewhere = tmp_path / "elsewhere"
    snapshot_download(REPOSITORY, local_dir=elsewhere)
    again = pushing(4, folder="elsewhere", push_to_hub=False, optim="adamw_torch")
    again.train(resume_from_checkpoint=resume if resume is True else str(elsewhere / resume))
    assert again.state.global_step == 4
    expected = weights(whole.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(again.model).items())
    assert not (elsewhere / "trajectory-1.zoo").exists(), "the same file goes on"
    pushed = hub.files(REPOSITORY)["last-checkpoint/model.safetensors"]
    again.push_to_hub()
    assert hub.files(REPOSITORY)["last-checkpoint/model.safetensors"] == pushed
    assert not (elsewhere / "last-checkpoint").exists(), "which is named as checkpoints are named here"


def test_a_private_repository_and_a_branch(hub, pushing):
    api = HfApi()
    made = pushing(hub_private_repo=True, hub_strategy="end")
    assert api.model_info(REPOSITORY).private
    api.create_branch(REPOSITORY, branch="tuned")
    made.train()
    made.push_to_hub(revision="tuned")
    assert hub.files(REPOSITORY).keys() & MODEL == set()
    card = hub.files(REPOSITORY, "tuned")["README.md"].decode()
    assert f'from_pretrained("{REPOSITORY}", revision="tuned")' in card
    assert f"zoo-hf replay {REPOSITORY} replayed --revision tuned\n" in card
    expected = weights(made.model)
    loaded = weights(AutoModelForCausalLM.from_pretrained(REPOSITORY, revision="tuned"))
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())


def test_it_generates_elsewhere_with_this_package_and_without(hub, pushing, tmp_path):
    tokenizer = byte_tokenizer()
    made = pushing(hub_strategy="end", keywords=[("processing_class", tokenizer)])
    made.model.resize_token_embeddings(len(tokenizer))
    made.train()
    made.push_to_hub()
    asked = {"max_new_tokens": 5, "do_sample": False}
    (here,) = pipeline("text-generation", model=REPOSITORY)("a", **asked)
    without = (
        "import sys; from transformers import pipeline\n"
        f"p = pipeline('text-generation', model='{REPOSITORY}', trust_remote_code=True)\n"
        f"print(repr(p('a', **{asked})[0]['generated_text']))\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'zoo_hf']"
    )
    variables = os.environ | environment(hub, tmp_path) | {"HF_HOME": str(tmp_path / "elsewhere")}
    done = subprocess.run([sys.executable, "-c", without], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == repr(here["generated_text"])


def test_the_token_is_in_nothing_that_is_written_or_said(hub, pushing, tmp_path, caplog, capfd):
    with caplog.at_level(logging.DEBUG):
        made = pushing(hub_token=hub.token, hub_strategy="all_checkpoints", logging_strategy="steps")
        made.train()
        made.push_to_hub()
        logging.getLogger("zoo_hf").info("%r", made.args)
    said = caplog.text + "".join(capfd.readouterr())
    written = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for place, content in {**written, **hub.files(REPOSITORY), "what was said": said.encode()}.items():
        assert hub.token.encode() not in content, place
    arguments = torch.load(tmp_path / "run/training_args.bin", weights_only=False)
    assert arguments.hub_token is None
    assert made.args.hub_token == hub.token, "it goes on being used"


def test_a_token_is_a_string_where_it_is_used():
    token = Token("hf_secret")
    assert f"Bearer {token}" == "Bearer hf_secret"
    assert pickle.loads(pickle.dumps({"token": token})) == {"token": None}
    assert deepcopy([token]) == ["hf_secret"]
    assert repr([token]) == "[<HUB_TOKEN>]"


def no_token(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")


def a_wrong_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")


def a_token_that_may_only_read(hub, monkeypatch):
    (token,) = hub.readers
    monkeypatch.setenv("HF_TOKEN", token)


def no_repository(hub, monkeypatch):
    HfApi().delete_repo(REPOSITORY)


def a_conflict(hub, monkeypatch):
    hub.busy = 1000


def no_server(hub, monkeypatch):
    hub.die()


def no_server_from_the_middle_on(hub, monkeypatch):
    hub.dies_at = lambda line: "/commit/" in line


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (no_token, "The token is missing or wrong: `hf auth login`"),
        (a_wrong_token, "The token is missing or wrong: `hf auth login`"),
        (a_token_that_may_only_read, "The token may not write there: take one with the role `write`"),
        (no_repository, "There is no such repository or branch"),
        (a_conflict, "Somebody else has written at the same time"),
        (no_server, "The Hub was not reached, or has broken off"),
        (no_server_from_the_middle_on, "The Hub was not reached, or has broken off"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_push_that_fails_says_why_loses_nothing_and_a_second_one_completes_it(
    hub, impatient, pushing, tmp_path, monkeypatch, wrong, said
):
    made = pushing(hub_strategy="end")
    made.train()
    with monkeypatch.context() as during:
        wrong(hub, during)
        with pytest.raises(PushError) as error:
            made.push_to_hub()
    assert str(error.value).startswith(f"{REPOSITORY} was not pushed: ")
    assert said in str(error.value)
    assert f"Nothing is lost: what was saved is in {tmp_path / 'run'}" in str(error.value)
    assert hub.token not in str(error.value)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert all(torch.equal(weight, weights(made.model)[name]) for name, weight in weights(saved).items())
    hub.revive()
    hub.busy = 0
    if wrong is no_repository:
        HfApi().create_repo(REPOSITORY)
    made.push_to_hub()
    files = hub.files(REPOSITORY)
    assert files.keys() >= MODEL | RUN
    assert files["model.safetensors"] == Path(tmp_path / "run/model.safetensors").read_bytes()


def test_a_model_is_saved_before_its_repository_is_asked_for(hub, impatient, pushing, tmp_path):
    made = pushing(push_to_hub=False, save_strategy="no")
    made.train()
    hub.die()
    with pytest.raises(PushError, match="Nothing is lost: what was saved is in"):
        made.push_to_hub()
    saved = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "run"))
    assert all(torch.equal(saved[name], weight) for name, weight in weights(made.model).items())


@pytest.mark.parametrize("always", [True, False])
def test_a_record_that_grows_while_it_is_pushed_arrives_as_it_was(hub, pushing, monkeypatch, caplog, always):
    monkeypatch.setattr("local_hub_storage.LARGE_SUFFIXES", (*LARGE_SUFFIXES, ".zoo"))
    made = pushing(20, hub_strategy="every_save", save_steps=2, hub_always_push=always)
    with caplog.at_level(logging.WARNING, logger="zoo_hf"):
        made.train()
        made.push_to_hub()
    assert [record.message for record in caplog.records if record.name == "zoo_hf.pushing"] == []
    for commit in HfApi().list_repo_commits(REPOSITORY)[:-1]:
        pushed = HfApi().hf_hub_download(REPOSITORY, "trajectory.zoo", revision=commit.commit_id)
        assert len(Trajectory.open(pushed)) >= 2


def test_a_token_with_a_line_end_is_used_and_not_said(hub, pushing):
    made = pushing(hub_token=f"{hub.token}\n", hub_strategy="end")
    made.train()
    made.push_to_hub()
    with pytest.raises(PushError) as error:
        made.push_to_hub(token="hf_secret\n")
    assert "secret" not in str(error.value)


def test_the_replay_of_a_best_model_stops_where_it_was_best(hub, pushing):
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 50.0}
    made = pushing(4, hub_strategy="end", keywords=[("eval_dataset", texts(8))], **best)
    made.train()
    made.push_to_hub()
    assert made.state.best_global_step < 4
    assert f"zoo-hf replay {REPOSITORY} replayed --upto {made.state.best_global_step}\n" in (
        hub.files(REPOSITORY)["README.md"].decode()
    )


def test_a_missing_branch_is_said(hub, pushing):
    made = pushing(hub_strategy="end")
    made.train()
    with pytest.raises(PushError, match="There is no such repository or branch"):
        made.push_to_hub(revision="nowhere")


@pytest.mark.parametrize("wrong", [no_token, no_server], ids=lambda wrong: wrong.__name__)
def test_what_cannot_be_pushed_to_is_said_before_the_training(hub, impatient, pushing, monkeypatch, wrong):
    wrong(hub, monkeypatch)
    with pytest.raises(PushError, match="was not pushed"):
        pushing()


def test_a_push_in_the_background_that_fails_is_said_and_the_run_goes_on(hub, impatient, pushing, caplog):
    hub.dies_at = lambda line: "/commit/" in line
    made = pushing(3, hub_strategy="every_save")
    with caplog.at_level(logging.WARNING, logger="zoo_hf"):
        made.train()
    assert made.state.global_step == 3
    warned = [record.message for record in caplog.records if record.name == "zoo_hf.pushing"]
    assert warned
    assert all("was not pushed" in text and "a second push completes" in text for text in warned)
    hub.revive()
    made.push_to_hub()
    assert hub.files(REPOSITORY).keys() >= MODEL | RUN


class Stop(TrainerCallback):
    """Ends a run after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
