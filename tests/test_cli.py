"""The zoo-hf command prints what a bug report needs, and explains itself."""

import platform
from importlib.metadata import entry_points, version

import pytest
import torch
import transformers
from conftest import texts
from transformers import set_seed

from zoo_hf import RNNConfig, RNNForCausalLM, cli
from zoo_hf.cli import env


def test_env_is_a_table_of_versions_and_threads(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = dict([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line)
    assert rows["Python"] == platform.python_version()
    assert rows["torch"] == version("torch")
    assert rows["transformers"] == transformers.__version__
    assert rows["threads"].startswith(f"{torch.get_num_threads()},")
    assert rows["OMP_NUM_THREADS"] == "7"
    assert len({line.index("|", 1) for line in lines}) == 1, "the first column is aligned"


def test_gpus_are_counted_by_name(monkeypatch):
    names = ["A100", "A100", "T4"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    monkeypatch.setattr(env, "choices", lambda: {"lstm": "triton"})
    rows = env.environment()
    assert rows["hardware"] == "2 × A100, 1 × T4"
    assert rows["kernels of lstm"] == "triton"


def test_a_backend_that_cannot_run_is_a_mistake_and_no_traceback(monkeypatch, capsys):
    monkeypatch.setenv("ZOO_HF_KERNELS", "cuda")
    assert cli.main(["env"]) == 2
    assert "ZOO_HF_KERNELS must be one of ['auto', 'plain', " in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), ([], 2), (["fly"], 2)])
def test_help_and_mistakes_name_the_commands(arguments, status, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    printed = capsys.readouterr()
    assert stop.value.code == status
    assert "env" in printed.out + printed.err or "command" in printed.err


def test_the_installed_command_is_this_function():
    (script,) = entry_points(group="console_scripts", name="zoo-hf")
    assert script.load() is cli.main


@pytest.fixture
def trained(trainer, tmp_path):
    """A folder with a run of four steps of a new model, and the model that it started from."""
    set_seed(42)
    model = RNNForCausalLM(RNNConfig(vocab_size=32, embedding_size=8, hidden_size=16))
    model.save_pretrained(tmp_path / "start")
    made = trainer(model, texts(10), max_steps=4, output_dir=str(tmp_path / "run"), optim="adamw_torch")
    made.train()
    made.save_model()
    return tmp_path


@pytest.mark.parametrize("options", [["--model", "start"], []], ids=["weights", "origin"])
@pytest.mark.parametrize("place", ["run", "run/trajectory.zoo"], ids=["folder", "file"])
def test_replay_saves_the_weights_of_the_run(trained, options, place, capsys, monkeypatch):
    monkeypatch.chdir(trained)
    paths = [place, "again"]
    assert cli.main(["replay", *paths, *options]) == 0
    assert capsys.readouterr().out == "The run is made again: again\n"
    assert (trained / "again/model.safetensors").read_bytes() == (trained / "run/model.safetensors").read_bytes()
    assert cli.main(["replay", *paths, *options, "--upto", "0"]) == 0
    assert (trained / "again/model.safetensors").read_bytes() == (trained / "start/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["replay", "run", "again", "--model", "run"], "the model's weights are not those that the run started"),
        (["replay", "run", "again", "--upto", "9"], "`upto` must be between 0 and 4"),
        (["replay", "run", "again", "--model", "nothing"], "couldn't find them in the cached files"),
        (["replay", "run/model.safetensors", "again"], "this is no trajectory of zoo_hf"),
        (["replay", "a/b/c", "again"], "a/b/c: there is no such file or folder"),
        (["replay", "start", "again"], "start: in this folder is no trajectory.zoo"),
        (["trajectory", "info", "run/nothing.zoo"], "No such file"),
    ],
)
def test_a_mistake_is_said_in_a_line_and_ends_with_two(trained, arguments, said, capsys, monkeypatch):
    monkeypatch.chdir(trained)
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err
    assert said in printed[printed.index("zoo-hf: ") :]
    assert "Traceback" not in printed
    assert not (trained / "again").exists()


def test_info_is_a_table_of_the_run(trained, capsys):
    assert cli.main(["trajectory", "info", str(trained / "run/trajectory.zoo")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = dict([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert rows["steps"] == "4, from 0"
    assert rows["optimizer"] == "torch.optim.adamw.AdamW"
    assert (rows["seed"], rows["num_directions"], rows["pairs left out"]) == ("42", "4", "0 of 16")
    assert float(rows["loss"].split()[0]) == pytest.approx(3.5, abs=0.1)
    assert rows["file"].endswith(f"{(trained / 'run/trajectory.zoo').stat().st_size:,} bytes")


def test_plot_draws_the_run(trained, capsys):
    picture = trained / "picture.png"
    assert cli.main(["trajectory", "plot", str(trained / "run/trajectory.zoo"), "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
