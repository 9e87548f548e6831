"""The zoo-hf command prints what a bug report needs, and explains itself."""

import platform
from importlib.metadata import entry_points, version

import pytest
import torch
import transformers

from zoo_hf import cli


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
    assert cli.environment()["hardware"] == "2 × A100, 1 × T4"


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
