"""The commands of zoo-hf that train, score, sample, describe and draw do so on a real run of a tiny model."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import texts, tiny_lstm
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from zoo_hf import RNNConfig, RNNForCausalLM, cli
from zoo_hf.cards import RUN_NAME, model_card, run_in
from zoo_hf.cli.plot import draw, log_of, step_times, training_loss, validation_loss
from zoo_hf.clm.harness import score_by_harness
from zoo_hf.clm.scoring import nats, score
from zoo_hf.procedure import command
from zoo_hf.tasks import TextLoss, byte_tokenizer


EXAMPLE = Path(__file__).parent.parent / "examples" / "run_clm.py"
TEXT = "".join(f"Line {number} of a text with an é.\n" for number in range(60))
ARGUMENTS = [
    *("--do_train", "--do_eval", "--use_cpu", "--max_steps", "4", "--logging_steps", "1", "--block_size", "16"),
    *("--num_directions", "2", "--eval_strategy", "steps", "--eval_steps", "2", "--num_threads", "1"),
    *("--config_overrides", "embedding_size=8,hidden_size=8"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a text and of a run by `zoo-hf train`."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    verbosity = transformers_logging.get_verbosity()
    files = ["--train_file", str(folder / "text.txt"), "--output_dir", str(folder / "out")]
    assert cli.main(["train", *files, *ARGUMENTS]) == 0
    transformers_logging.set_verbosity(verbosity)
    return folder


@pytest.fixture(autouse=True)
def verbosity():
    before = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(before)


def said(capsys, *arguments: object) -> dict[str, str]:
    """The rows of the table that a command prints."""
    assert cli.main([str(argument) for argument in arguments]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return dict([cell.strip() for cell in line.strip("|").split("|")] for line in lines)


def test_train_gives_the_weights_of_the_example(run, tmp_path, monkeypatch):
    files = ["--train_file", str(run / "text.txt"), "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *files, *ARGUMENTS])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    one, two = (load_file(folder / "model.safetensors") for folder in (run / "out", tmp_path))
    torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("command", ["train", "tune"])
def test_the_commands_with_the_arguments_of_a_run_explain_them(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: zoo-hf {command} ")
    assert "--smoothing_radius" in printed


def test_the_command_stands_on_the_card_without_tokens():
    typed = ["/somewhere/bin/zoo-hf", "train", "--hub_token", "secret"]
    assert command(typed) == "`zoo-hf train --hub_token TOKEN`"


def test_tune_says_which_rate_lowers_the_loss_most_and_trains_nothing(run, tmp_path, capsys):
    files = ["--train_file", run / "text.txt", "--output_dir", tmp_path, "--learning_rate", 0.1]
    rows = said(capsys, "tune", *files, *ARGUMENTS)
    losses = {float(rate): loss for rate, loss in rows.items() if rate[:1].isdigit()}
    (best,) = [rate for rate, loss in losses.items() if loss.endswith(" (best)")]
    assert float(losses[best].split()[0]) == min(float(loss.split()[0]) for loss in losses.values())
    assert float(losses[best].split()[0]) < float(rows["before"])
    assert 0.1 in losses
    assert [path.name for path in tmp_path.iterdir()] == ["learning_rate.png"]


def model_of(vocabulary=256):
    torch.manual_seed(0)
    return RNNForCausalLM(RNNConfig(vocab_size=vocabulary, embedding_size=8, hidden_size=16)).eval()


@pytest.mark.parametrize("window", [4, 5, 7, 12, 1000])
def test_every_token_is_predicted_once_from_those_before_it_in_its_window(window):
    model, ids, first = model_of(), [5, 4, 3, 2, 1, 9, 8, 7, 6, 0, 11, 10], 255
    found = nats(model, ids, first, window=window, batch_size=2)
    tokens, size = torch.tensor([first, *ids]), min(window, len(ids))
    for place in range(len(ids)):
        start = place // size * size if place < len(ids) // size * size else len(ids) - size
        logits = model(tokens[None, start : place + 1]).logits[0, -1]
        assert found[place].item() == pytest.approx(cross_entropy(logits, tokens[place + 1]).item(), rel=1e-5)


def test_the_metric_divides_nats_among_tokens_and_bytes():
    metric = TextLoss(keep_in_memory=True)
    figures = metric.compute(predictions=[[1.0, 3.0], [5.0]], references=["é", "ab"])
    assert figures == {
        "loss": 3.0,
        "perplexity": pytest.approx(math.exp(3)),
        "bits_per_byte": pytest.approx(9 / math.log(2) / 4),
    }


@pytest.mark.parametrize("window", [64, 100_000])
def test_the_harness_gives_the_same_figures_of_the_same_windows(window):
    arguments = model_of(), byte_tokenizer(), TEXT
    ours = score(*arguments, window=window, batch_size=3)
    theirs = score_by_harness(*arguments, window=window, batch_size=3)
    assert theirs == {name: pytest.approx(value, rel=1e-5) for name, value in ours.items()}
    assert ours["loss"] == pytest.approx(math.log(256), rel=0.05)


def test_evaluate_prints_the_figures_of_a_saved_model_on_a_file(run, capsys):
    rows = said(capsys, "evaluate", run / "out", "--text", run / "text.txt", "--window", 50)
    model = AutoModelForCausalLM.from_pretrained(run / "out")
    figures = score(model, byte_tokenizer(), TEXT, window=50, batch_size=8)
    assert rows["loss (nats a token)"] == f"{figures['loss']:.5f}"
    assert float(rows["bits per byte"]) == pytest.approx(figures["loss"] / math.log(2), abs=1e-4)
    assert rows["text"] == f"{run / 'text.txt'}, {len(TEXT.encode()):,} bytes"
    assert rows["computed by"] == "evaluate"


def test_without_lm_eval_the_harness_says_what_to_install(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.task", None)
    assert cli.main(["evaluate", str(run / "out"), "--text", str(run / "text.txt"), "--harness"]) == 2
    assert 'zoo-hf: --harness needs lm-eval: pip install "zoo_hf[harness]"' in capsys.readouterr().err


def test_generate_writes_the_same_text_for_the_same_seed(run, capsys):
    def text(*options: object) -> str:
        arguments = ["generate", run / "out", "--prompt", "Line", "--tokens", 40, *options]
        assert cli.main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    generator = torch.get_rng_state()
    assert text("--seed", 1) == text("--seed", 1) != text("--seed", 2)
    assert text("--seed", 1, "--temperature", 0) == text("--seed", 2, "--temperature", 0) != text("--seed", 1)
    assert text().startswith("Line")
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "out", "--prompt", ""], "The prompt is empty"),
        (["generate", "out", "--prompt", "x", "--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["generate", "out", "--prompt", "x", "--temperature", "-1"], "--temperature must be a number from 0 on"),
        (["generate", "absent", "--prompt", "x"], "The tokenizer absent cannot be loaded"),
        (["evaluate", "out", "--window", "0"], "--window must be at least 1"),
        (["evaluate", "out", "--batch_size", "0"], "--batch_size must be at least 1"),
        (["evaluate", "out", "--text", "absent.txt"], "absent.txt"),
        (["evaluate", "out", "--text", "out/model.safetensors"], "cannot be read: 'utf-8' codec"),
        (["card", "."], f".: there is no {RUN_NAME}, which a trainer writes"),
        (["plot", "."], ".: there is no trainer_state.json"),
        (["train", "--train_file", "absent.txt"], "--train_file absent.txt: there is no such file"),
        (["train", "absent.json"], "absent.json: there is no such file"),
        (["tune", "--num_directions", "0"], "`num_directions` must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_line_and_ends_with_two(run, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(run)
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed[printed.index("zoo-hf: ") :].removesuffix("\n")
    assert "\n" not in printed[printed.index("zoo-hf: ") :].removesuffix("\n")


def test_other_commands_refuse_arguments_that_they_do_not_know(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["env", "--fast"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --fast" in capsys.readouterr().err


def test_the_card_written_anew_is_the_one_that_the_trainer_wrote(run):
    written = (run / "out" / "README.md").read_text(encoding="utf-8")
    (run / "out" / "README.md").unlink()
    assert cli.main(["card", str(run / "out"), "--dataset", "text.txt"]) == 0
    assert (run / "out" / "README.md").read_text(encoding="utf-8") == written
    assert "bits_per_byte" in written


def test_a_run_leaves_what_its_card_says_and_one_that_has_begun_takes_it_away(trainer, tmp_path):
    made = trainer(tiny_lstm(), texts(8), {"eval_dataset": texts(4)})
    made.train()
    assert run_in(str(tmp_path)).metrics == {}
    loss = made.evaluate()["eval_loss"]
    assert run_in(str(tmp_path)).metrics["loss"] == loss
    assert run_in(str(tmp_path)).procedure["steps"] == "2"
    saved = json.loads((tmp_path / RUN_NAME).read_text())
    assert model_card(made).data.eval_results[0].metric_value == saved["metrics"]["loss"]
    made.callback_handler.on_train_begin(made.args, made.state, made.control)
    with pytest.raises(ValueError, match=f"there is no {RUN_NAME}"):
        run_in(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": 1}'])
def test_a_file_that_no_trainer_has_written_is_named(tmp_path, content):
    (tmp_path / RUN_NAME).write_text(content)
    with pytest.raises(ValueError, match=r"zoo_run.json is not what a trainer has written"):
        run_in(str(tmp_path))


LOG = [
    {"step": 0, "eval_loss": 5.0, "eval_runtime": 1.0},
    {"step": 10, "loss": 4.0, "forward_passes": 80, "seconds": 3.0, "tokens": 640, "coefficient_spread": 0.5},
    {"step": 15, "eval_loss": 3.5, "eval_runtime": 0.5},
    {"step": 20, "loss": 3.0, "forward_passes": 160, "seconds": 5.5, "tokens": 1280, "coefficient_spread": 0.25},
    {"step": 30, "loss": 2.0, "forward_passes": 240, "seconds": 1.0, "tokens": 1920, "coefficient_spread": 0.2},
]


@pytest.fixture
def logged(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    return log_of(str(tmp_path))


def test_losses_stand_at_what_the_log_has_counted_and_seconds_go_on_after_a_restart(logged):
    assert training_loss(logged, "tokens") == [(640, 4.0), (1280, 3.0), (1920, 2.0)]
    assert training_loss(logged, "seconds") == [(3.0, 4.0), (5.5, 3.0), (6.5, 2.0)]
    assert validation_loss(logged, "forward_passes") == [(0, 5.0), (120, 3.5)]
    assert validation_loss(logged, "seconds") == [(0, 5.0), (4.25, 3.5)]


def test_the_time_of_a_step_is_without_evaluations(logged):
    assert step_times(logged) == [(80, pytest.approx(200)), (160, pytest.approx(200)), (240, pytest.approx(100))]


def test_runs_are_drawn_in_one_picture_with_a_line_each(run, logged, tmp_path, capsys):
    picture = tmp_path / "runs.png"
    assert cli.main(["plot", str(run / "out"), str(tmp_path), "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 30_000
    history = log_of(str(run / "out"))
    seconds = [second for second, _ in training_loss(history, "seconds")]
    assert len(seconds) == 4
    assert sorted(seconds) == seconds
    assert 0 < seconds[-1] < 60


def test_a_log_without_seconds_is_drawn_without_them(logged, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.append(figure))
    old = [{name: value for name, value in entry.items() if name != "seconds"} for entry in logged]
    draw({"old": old}, tmp_path / "p.png")
    panels = figures[0].axes
    assert [len(panel.lines) for panel in panels] == [2, 0, 2, 1, 0, 1]
    assert [text.get_text() for text in panels[1].texts] == ["not in the log"]


def test_other_commands_do_not_wait_for_evaluate_to_be_imported():
    script = "import sys, zoo_hf.cli; sys.exit('evaluate' in sys.modules or 'lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120).returncode == 0
