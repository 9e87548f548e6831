"""The search for a learning rate."""

import logging
import math

import pytest
import torch
from conftest import texts, tiny_lstm, weights


def test_the_rate_that_lowers_the_loss_most_is_found_and_drawn(trainer, tmp_path, caplog):
    made = trainer(tiny_lstm(), texts(8), num_directions=16)
    with caplog.at_level(logging.INFO, "zoo_hf.learning_rate"):
        found = made.find_learning_rate([1e-5, 0.03, 0.3, 1e4, 1e5, 1e6], steps=5)
    assert found.best in (0.03, 0.3)
    assert min(found.losses) < found.start - 0.01
    assert found.losses[0] == pytest.approx(found.start, abs=1e-3)
    assert found.rates[-1] == 1e5, "two in a row were too large"
    assert "learning_rate=0.03: " in caplog.text
    assert (tmp_path / "learning_rate.png").stat().st_size > 10_000


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_nothing_is_changed(trainer, tmp_path, optim):
    model, untouched = tiny_lstm(), tiny_lstm()
    made, other = trainer(model, texts(8), optim=optim), trainer(untouched, texts(8), optim=optim)
    before, generator = weights(model), torch.get_rng_state()
    made.find_learning_rate(steps=2)
    assert torch.equal(torch.get_rng_state(), generator)
    for name, weight in weights(model).items():
        assert torch.equal(weight, before[name]), name
    made.train()
    other.train()
    for name, weight in weights(model).items():
        assert torch.equal(weight, untouched.get_parameter(name)), name
    assert made.args.learning_rate == other.args.learning_rate
    assert made.update.forward_passes == other.update.forward_passes


def test_the_losses_are_those_of_runs_with_these_rates(trainer):
    examples, steps = texts(4), 3
    found = trainer(tiny_lstm(), examples).find_learning_rate([0.05, 0.2], steps=steps)
    for rate, loss in zip(found.rates, found.losses, strict=True):
        model = tiny_lstm()
        made = trainer(model, examples, {"eval_dataset": examples}, learning_rate=rate, max_steps=steps)
        made.train()
        assert made.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_an_objective_of_ones_own_is_what_is_lowered(trainer):
    made = trainer(tiny_lstm(), texts(4), {"compute_objective": lambda model, inputs, outputs: 100 * outputs.loss})
    assert made.find_learning_rate([1e-4], steps=1).start == pytest.approx(100 * math.log(32), rel=0.1)


def test_without_a_rate_that_helps_there_is_advice(trainer, caplog):
    made = trainer(tiny_lstm(), texts(4))
    found = made.find_learning_rate([1e4, 1e5], steps=2)
    assert min(found.losses) > found.start
    assert "No learning rate from 10000 to 100000 lowered the loss in 2 steps: try smaller ones" in caplog.text


def test_weights_are_put_back_after_an_error(trainer):
    model = tiny_lstm()
    before = weights(model)

    def failing(model, inputs):
        if not torch.equal(model.lm_head.bias, before["lm_head.bias"]):
            raise KeyError("no")
        return model(**inputs).loss

    made = trainer(model, texts(4), {"compute_objective": failing})
    with pytest.raises(KeyError):
        made.find_learning_rate([0.1], steps=1)
    for name, weight in weights(model).items():
        assert torch.equal(weight, before[name]), name
    assert made.optimizer is None


@pytest.mark.parametrize(
    ("arguments", "error"), [({"steps": 0}, "`steps` must be at least 1"), ({"rates": [-1.0]}, "`rates` positive")]
)
def test_what_makes_no_sense_is_refused(trainer, arguments, error):
    with pytest.raises(ValueError, match=error):
        trainer(tiny_lstm(), texts(4)).find_learning_rate(**arguments)


def test_a_given_optimizer_is_refused(trainer):
    model = tiny_lstm()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="choose one by `optim`"):
        trainer(model, texts(4), {"optimizers": (optimizer, None)}).find_learning_rate()
