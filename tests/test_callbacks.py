"""The loss plot shows the losses of the log at the forward passes they were reached with."""

import builtins
import math

import pytest
from conftest import VOCABULARY, texts, tiny_lstm
from matplotlib.figure import Figure

from zoo_hf.callbacks import LossPlotCallback, loss_curves, plot_losses


HISTORY = [
    {"step": 0, "eval_loss": 5.0, "eval_runtime": 0.1},
    {"step": 10, "loss": 4.0, "forward_passes": 80},
    {"step": 15, "eval_loss": 3.5},
    {"step": 20, "loss": 3.0, "forward_passes": 160},
    {"step": 20, "eval_loss": 2.5, "forward_passes": 160},
    {"step": 20, "train_loss": 3.5, "train_runtime": 9.0, "forward_passes": 160},
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, each with its path."""
    figures = []
    save = Figure.savefig

    def keep(figure, path, **kwargs):
        figures.append((figure, path))
        save(figure, path, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def lines(figure):
    return {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}


def test_curves_are_the_logged_losses_against_forward_passes():
    assert loss_curves(HISTORY) == {
        "training": ([80, 160], [4.0, 3.0]),
        "validation": ([0, 120, 160], [5.0, 3.5, 2.5]),
    }


def test_each_evaluation_set_has_its_curve():
    history = [*HISTORY[1:2], {"step": 10, "eval_wiki_loss": 4.5}, {"step": 10, "eval_old_news_loss": 4.25}]
    assert loss_curves(history) == {
        "training": ([80], [4.0]),
        "validation wiki": ([80], [4.5]),
        "validation old news": ([80], [4.25]),
    }


def test_a_log_without_losses_has_no_curves():
    assert loss_curves([{"step": 2, "train_runtime": 1.0, "forward_passes": 8}]) == {}


def test_the_plot_shows_the_curves_and_says_what_they_are(drawn, tmp_path):
    model = tiny_lstm()
    plot_losses(loss_curves(HISTORY), model, tmp_path / "loss.png")
    ((figure, path),) = drawn
    shown = lines(figure)
    assert shown["training"] == [[80, 4.0], [160, 3.0]]
    assert shown["validation"] == [[0, 5.0], [120, 3.5], [160, 2.5]]
    uniform = shown[f"uniform guess, {math.log(VOCABULARY):.2f}"]
    assert {y for _, y in uniform} == {math.log(VOCABULARY)}
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("forward passes", "loss (nats a token)")
    assert axes.get_title() == "RNNForCausalLM, 2 k weights: validation loss 2.500 after 160.0 forward passes"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_uniform_guess_is_left_out_when_the_model_starts_far_below_it(drawn, tmp_path):
    plot_losses({"training": ([8], [0.5])}, tiny_lstm(), tmp_path / "loss.png")
    assert list(lines(drawn[0][0])) == ["training"]


def test_a_run_draws_its_own_log(trainer, drawn, tmp_path):
    run = trainer(tiny_lstm(), texts(8), {"eval_dataset": texts(4)}, eval_strategy="steps", eval_steps=1)
    run.add_callback(LossPlotCallback())
    run.train()
    figure, path = drawn[-1]
    assert path == tmp_path / "loss.png"
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert lines(figure)["training"] == [[8, losses[0]], [16, losses[1]]]
    assert [x for x, _ in lines(figure)["validation"]] == [8, 16]


def test_an_evaluation_after_the_run_is_drawn_too(trainer, drawn):
    run = trainer(tiny_lstm(), texts(8), {"eval_dataset": texts(4), "callbacks": [LossPlotCallback()]})
    run.evaluate()
    assert drawn == []
    run.train()
    before = len(lines(drawn[-1][0]).get("validation", []))  # `train` starts a new log, but for what it resumes
    run.evaluate()
    assert len(lines(drawn[-1][0])["validation"]) == before + 1


def test_a_checkpoint_has_its_plot(trainer, drawn):
    run = trainer(tiny_lstm(), texts(8), {"callbacks": [LossPlotCallback()]}, save_strategy="steps", save_steps=1)
    run.train()
    assert [len(lines(figure)["training"]) for figure, _ in drawn] == [1, 2, 2]


def test_only_the_first_process_draws(trainer, drawn):
    run = trainer(tiny_lstm(), texts(8))
    run.train()
    run.state.is_world_process_zero = False
    LossPlotCallback().on_train_end(run.args, run.state, run.control, model=run.model)
    assert drawn == []


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    imported = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "matplotlib":
            raise ModuleNotFoundError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r'pip install "zoo_hf\[plot\]"'):
        LossPlotCallback()
