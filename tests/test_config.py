"""The arguments: which there are, what they refuse, and what becomes of other classes of training arguments."""

import json
import logging
import pickle
from dataclasses import dataclass, fields

import pytest
from transformers import HfArgumentParser, TrainingArguments
from trl import SFTConfig

from zoo_hf import ZOOArguments, ZOOConfig
from zoo_hf.config import complete_, settings


OWN = {
    "num_directions": 32,
    "smoothing_radius": None,
    "estimator": "central",
    "distribution": "rademacher",
    "direction_rank": 1,
    "probes": "auto",
    "members_per_forward": None,
    "dropout": False,
    "carry_state": False,
    "data": "shared",
    "normalize": "none",
    "rank_check_steps": 100,
}
CHANGED = {"learning_rate": None, "max_grad_norm": 0.0}


@dataclass
class ZOOSFTConfig(ZOOArguments, SFTConfig):
    """Of another trainer, as a user would write it."""


def test_a_new_field_is_a_decision():
    assert {f.name: f.default for f in fields(ZOOArguments)} == OWN | CHANGED
    assert {f.name for f in fields(ZOOConfig)} - {f.name for f in fields(TrainingArguments)} == OWN.keys()


def test_only_the_defaults_that_the_docstring_names_differ_from_training_arguments():
    theirs = {f.name: f.default for f in fields(TrainingArguments)}
    ours = {f.name: f.default for f in fields(ZOOConfig)}
    assert {name for name in theirs if ours[name] != theirs[name]} == CHANGED.keys()
    assert all(f"`{name}`" in ZOOArguments.__doc__ for name in CHANGED)


def test_what_makes_a_run_the_run_it_is_are_the_seed_and_our_fields_but_for_the_learning_rate(config):
    args = config(seed=7)
    expected = OWN | {
        "num_directions": 4,
        "smoothing_radius": 1e-2,
        "probes": "serial",
        "seed": 7,
        "max_grad_norm": 0.0,
    }
    del expected["rank_check_steps"]  # looks at a run, and changes nothing of it
    assert settings(args) == expected


@pytest.mark.parametrize(
    ("optim", "n", "rate"),
    [
        ("adamw_torch", 32, 2e-2),
        ("adamw_torch", 128, 4e-2),
        ("sgd", 128, 8e-2),
        ("rmsprop", 8, 1e-2),
        ("sgd", 8, 5e-3),
    ],
)
def test_the_default_learning_rate_goes_with_the_directions(tmp_path, optim, n, rate):
    assert ZOOConfig(tmp_path, num_directions=n, optim=optim).learning_rate == rate
    assert ZOOConfig(tmp_path, num_directions=n, optim=optim, learning_rate=1e-3).learning_rate == 1e-3


def test_every_field_has_a_help_text():
    assert all(f.metadata["help"] for f in fields(ZOOArguments))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_directions", 0, "`num_directions` must be at least 1, got 0"),
        ("num_directions", -3, "`num_directions` must be at least 1, got -3"),
        ("smoothing_radius", 0.0, r"`smoothing_radius` must be positive and finite, got 0\.0"),
        ("smoothing_radius", float("nan"), "`smoothing_radius` must be positive and finite, got nan"),
        ("smoothing_radius", float("inf"), "`smoothing_radius` must be positive and finite, got inf"),
        ("estimator", "centre", r"`estimator` must be one of \('central', 'forward'\), got 'centre'"),
        ("distribution", "normal", r"`distribution` must be one of .*'low_rank_gaussian'\), got 'normal'"),
        ("rank_check_steps", -1, "`rank_check_steps` must not be negative, got -1; 0 is off"),
        ("normalize", "std", r"`normalize` must be one of \('none', 'loss_std'\), got 'std'"),
        ("data", "sharded", r"`data` must be one of \('shared', 'split'\), got 'sharded'"),
        ("max_grad_norm", -1.0, r"`max_grad_norm` must not be negative, got -1\.0"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(config, field, value, message):
    with pytest.raises(ValueError, match=message):
        config(**{field: value})


def test_the_command_line_sets_every_field(tmp_path):
    line = f"--output_dir {tmp_path} --use_cpu --num_directions 8 --smoothing_radius 1e-3 --estimator forward"
    line += " --probes population --members_per_forward 8 --direction_rank 2"
    line += " --distribution gaussian --dropout --carry_state --learning_rate 1e-4 --max_grad_norm 2"
    line += " --data shared --normalize loss_std --rank_check_steps 7"
    (args,) = HfArgumentParser(ZOOConfig).parse_args_into_dataclasses(line.split())
    values = (8, 1e-3, "forward", "gaussian", 2, "population", 8, True, True, "shared", "loss_std", 7, 1e-4, 2.0)
    assert tuple(getattr(args, name) for name in OWN | CHANGED) == values


def test_the_command_line_refuses_an_unknown_choice(tmp_path, capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(ZOOConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--estimator", "both"])
    assert "--estimator: invalid choice: 'both'" in capsys.readouterr().err


def test_a_json_file_sets_fields_and_leaves_the_others(tmp_path):
    path = tmp_path / "args.json"
    path.write_text(json.dumps({"output_dir": str(tmp_path), "use_cpu": True, "num_directions": 8}))
    (args,) = HfArgumentParser(ZOOConfig).parse_json_file(str(path))
    expected = OWN | CHANGED | {"num_directions": 8, "learning_rate": 1e-2}
    assert {name: getattr(args, name) for name in expected} == expected


# TRL's default
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_mixed_into_the_arguments_of_another_trainer_our_defaults_win(tmp_path):
    args = ZOOSFTConfig(output_dir=str(tmp_path), use_cpu=True)
    assert {name: getattr(args, name) for name in OWN | CHANGED} == OWN | CHANGED | {"learning_rate": 2e-2}
    assert args.max_length == SFTConfig(output_dir=str(tmp_path), use_cpu=True).max_length
    with pytest.raises(ValueError, match="`num_directions`"):
        ZOOSFTConfig(output_dir=str(tmp_path), use_cpu=True, num_directions=0)


def test_plain_training_arguments_are_completed_and_keep_their_learning_rate(config, caplog):
    args = config(TrainingArguments, learning_rate=5e-5)
    with caplog.at_level(logging.WARNING, logger="zoo_hf"):
        complete_(args)
    assert {name: getattr(args, name) for name in OWN} == OWN
    assert (args.learning_rate, args.max_grad_norm) == (5e-5, 0.0)
    assert [record.levelname for record in caplog.records if "max_grad_norm" in record.message] == ["WARNING"]


def test_a_norm_that_plain_training_arguments_chose_is_kept(config, caplog):
    args = config(TrainingArguments, max_grad_norm=0.5)
    complete_(args)
    assert args.max_grad_norm == 0.5
    assert caplog.records == []


def test_our_own_arguments_are_left_alone(config):
    args = config(max_grad_norm=1.0)
    complete_(args)
    assert args.max_grad_norm == 1.0


def test_arguments_survive_pickling_and_show_in_dicts(config):
    args = config(num_directions=8, estimator="forward")
    expected = OWN | CHANGED | {"num_directions": 8, "estimator": "forward", "learning_rate": 1e-2}
    expected |= {"probes": "serial", "smoothing_radius": 1e-2}
    again = pickle.loads(pickle.dumps(args))
    assert {name: getattr(again, name) for name in expected} == expected
    assert {name: args.to_dict()[name] for name in expected} == expected
    assert {name: json.loads(args.to_json_string())[name] for name in expected} == expected
    sanitized = expected | {"members_per_forward": "None"}  # trackers take no None
    assert {name: args.to_sanitized_dict()[name] for name in expected} == sanitized


@pytest.mark.parametrize(
    ("field", "value"), [("estimator", "forward"), ("probes", "population"), ("carry_state", True)]
)
def test_shares_of_a_batch_exclude_what_needs_all_of_it(config, field, value):
    with pytest.raises(ValueError, match=f"`data`='split' and `{field}`={value!r} exclude each other: use `{field}`="):
        config(data="split", **{field: value})
