"""Objectives that have no gradient."""

import pytest
import torch
from conftest import Estimates, batch, texts, tiny_lstm, weights

from zoo_hf import CentralDifference, Direction
from zoo_hf.perturbation import probe


def error_rate(model, inputs, outputs):
    """Share of the tokens that the model does not predict: a step function of its weights."""
    predicted, labels = outputs.logits[:, :-1].argmax(-1), inputs["labels"][:, 1:]
    return (predicted != labels).double().mean()


def missed(model, inputs):
    """Share of the generated tokens that are not among the first eight."""
    prompt = inputs["input_ids"][:, :2]
    new = model.generate(prompt, max_new_tokens=4, do_sample=False)[:, 2:]
    return (new >= 8).double().mean().item()


def trained(trainer, objective, examples, **arguments):
    """The objective before and after a run."""
    model = tiny_lstm(hidden_size=64)
    made = trainer(model, examples, {"compute_objective": objective, "eval_dataset": examples}, **arguments)
    before = made.evaluate()["eval_objective"]
    made.train()
    return before, made.evaluate()["eval_objective"], made


LARGE = {"num_directions": 32, "smoothing_radius": 0.1, "learning_rate": 0.5, "per_device_train_batch_size": 16}


def test_the_error_rate_falls(trainer):
    row = torch.arange(8) % 2 + 3
    examples = [{"input_ids": row, "labels": row}]
    before, after, made = trained(trainer, error_rate, examples, max_steps=40, probes="auto", **LARGE)
    assert before > 0.9
    assert after < before / 2
    assert next(iter(made.probes.chosen.values())) > 1, "it was evaluated as a population"


def test_a_reward_on_generated_text_rises_one_member_at_a_time(trainer, caplog):
    before, after, made = trained(trainer, missed, texts(8, length=4), max_steps=12, probes="auto", **LARGE)
    assert after < before - 0.3
    assert set(made.probes.chosen.values()) == {1}
    assert "one at a time, as a population failed" in caplog.text


@pytest.mark.parametrize("probes", ["serial", "population"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_coefficients_are_those_of_the_objective_on_the_whole_batch(trainer, probes, accumulation):
    model, examples, estimates = tiny_lstm(), texts(4), Estimates()
    sizes = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    made = trainer(
        model,
        examples,
        {"compute_objective": error_rate, "callbacks": [estimates]},
        max_steps=1,
        probes=probes,
        **sizes,
    )
    made.train()
    again, whole = tiny_lstm().eval(), batch(examples)
    directions = [Direction(made.args.seed, 0, i) for i in range(4)]
    estimator = CentralDifference(made.args.smoothing_radius)
    with torch.inference_mode():
        losses = probe(
            lambda: error_rate(again, whole, again(**whole)),
            dict(again.named_parameters()),
            estimator.members(directions),
            estimator.smoothing_radius,
        )
    expected = estimator.estimate(directions, losses)
    torch.testing.assert_close(estimates.seen[0].coefficients, expected.coefficients, rtol=1e-5, atol=1e-5)
    assert estimates.seen[0].loss == pytest.approx(expected.loss)


def test_the_mean_of_an_evaluation_counts_every_row_once(trainer):
    examples = texts(5)
    model = tiny_lstm()
    made = trainer(
        model, None, {"compute_objective": error_rate, "eval_dataset": examples}, per_device_eval_batch_size=2
    )
    whole = batch(examples)
    with torch.no_grad():
        expected = error_rate(model, whole, model(**whole)).item()
    for _ in range(2):
        assert made.evaluate()["eval_objective"] == pytest.approx(expected)
    assert made.evaluate(metric_key_prefix="test")["test_objective"] == pytest.approx(expected)


def test_rows_are_shared_out_among_pairs(trainer):
    examples = texts(8)
    model, start = tiny_lstm(), weights(tiny_lstm())
    arguments = {"data": "split", "per_device_train_batch_size": 8, "max_steps": 1, "smoothing_radius": 0.5}
    trainer(model, examples, {"compute_objective": error_rate}, **arguments).train()
    assert not torch.equal(model.lm_head.weight, start["lm_head.weight"])


def test_the_card_names_it(trainer, tmp_path):
    made = trainer(tiny_lstm(), texts(4), {"compute_objective": error_rate}, max_steps=1)
    made.train()
    made.create_model_card()
    assert "| objective | `error_rate`, minimised |" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda outputs: 0.0, r"must take \(model, inputs\) or \(model, inputs, outputs\), got .* with \['outputs'\]"),
        (lambda model, inputs: torch.zeros(3), r"must return one number, got a tensor of shape \(3,\)"),
    ],
)
def test_what_is_no_objective_is_refused(trainer, function, error):
    with pytest.raises(ValueError, match=error):
        trainer(tiny_lstm(), texts(4), {"compute_objective": function}).train()
