"""examples/push_to_hub.py publishes a model, or its trajectory alone, that others load."""

import importlib.util
import re
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from zoo_hf import load_from_trajectory


SCRIPT = Path(__file__).parent.parent.parent / "examples" / "push_to_hub.py"
REPOSITORY = "tester/tiny"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the script for two steps, with these arguments, and returns the weights it has trained."""
    specification = importlib.util.spec_from_file_location("push_to_hub", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)

    def run(*arguments):
        job = ["--hub_model_id", REPOSITORY, "--max_steps", "2", "--num_directions", "2", "--logging_steps", "1"]
        job += ["--use_cpu", "--report_to", "none", "--save_strategy", "steps", "--save_steps", "2"]
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *job, "--output_dir", str(tmp_path / "run"), *arguments])
        module.main()
        return load_file(tmp_path / "run/checkpoint-2/model.safetensors")

    yield run
    transformers_logging.enable_progress_bar()
    datasets.enable_progress_bars()


def same(model, trained):
    held = model.state_dict()
    return all(torch.equal(held[name], weight) for name, weight in trained.items())


def test_the_weights_arrive_and_write_what_they_write(hub, run, capsys):
    trained = run()
    files = hub.files(REPOSITORY)
    assert files.keys() >= {"model.safetensors", "README.md", "loss.png", "trajectory.zoo", "tokenizer.json"}
    assert "modeling_rnn.py" in files
    assert same(AutoModelForCausalLM.from_pretrained(REPOSITORY), trained)
    printed = capsys.readouterr().out
    assert re.findall(r"^step +(\d+): loss ", printed, re.MULTILINE) == ["1", "2"]
    assert f"published as {REPOSITORY}. Loaded from there, it writes:\n\nThe " in printed


def test_a_trajectory_alone_makes_the_same_weights(hub, run, capsys):
    trained = run("--trajectory_only")
    files = hub.files(REPOSITORY)
    assert "model.safetensors" not in files
    assert len(files["trajectory.zoo"]) < 10_000
    assert same(load_from_trajectory(REPOSITORY), trained)
    assert "it writes:\n\nThe " in capsys.readouterr().out


def test_a_push_that_fails_is_one_line(hub, impatient, run, capsys):
    hub.die()
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2
    assert f"push_to_hub.py: error: {REPOSITORY} was not pushed: " in capsys.readouterr().err
