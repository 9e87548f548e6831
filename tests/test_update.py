"""Updates: the dense estimate, made and applied one parameter at a time, through optimizers that do not notice."""

import pytest
import torch

from zoo_hf.estimators import Estimate
from zoo_hf.gradients import gradient, gradients
from zoo_hf.low_rank import LowRank
from zoo_hf.noise import Direction, entries
from zoo_hf.update import Update


BOTH = pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
SHAPES = {"embed": (40, 8), "weight": (16, 24), "bias": (24,), "scale": (1,)}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=False),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "muon": lambda p: torch.optim.Muon([x for x in p if x.ndim == 2], lr=0.1),
}


def parameters(rng, dtype=torch.float32):
    return {n: torch.nn.Parameter(torch.randn(s, generator=rng).to(dtype)) for n, s in SHAPES.items()}


def an_estimate(rng, n=7, step=0, distribution="rademacher"):
    directions = [Direction(seed=5, step=step, index=i) for i in range(n)]
    return Estimate(directions, torch.randn(n, generator=rng), 1.0, distribution)


def dense(estimate, name, parameter):
    """(1/n) Σ cᵢ zᵢ in float64, all directions at once."""
    z = torch.stack(
        [
            entries(d, name, 0, parameter.numel(), distribution=estimate.distribution, dtype=torch.float64)
            for d in estimate.directions
        ]
    )
    return (estimate.coefficients.double() @ z / len(z)).view_as(parameter)


@BOTH
@pytest.mark.parametrize("numel", [1, 127, 128, 129, 300_001])
def test_gradient_is_the_mean_of_coefficients_times_directions(rng, distribution, numel):
    estimate, parameter = an_estimate(rng, distribution=distribution), torch.zeros(numel)
    expected = dense(estimate, "w", parameter).float()
    torch.testing.assert_close(gradient(estimate, "w", parameter), expected, rtol=1e-6, atol=1e-6)


def test_gradient_of_many_directions_does_not_depend_on_how_the_work_is_cut(rng, monkeypatch):
    estimate, parameter = an_estimate(rng, n=100), torch.zeros(20_000)
    whole = gradient(estimate, "w", parameter)
    monkeypatch.setattr("zoo_hf.noise.PHILOX_BLOCKS", 640)
    monkeypatch.setattr("zoo_hf.noise.PACKED_BYTES", 1 << 13)
    monkeypatch.setattr("zoo_hf.gradients.CHUNK", 1 << 10)
    assert torch.equal(gradient(estimate, "w", parameter), whole)


def test_gradient_is_summed_wide_and_rounded_once_for_half_precision_weights(rng):
    estimate, parameter = an_estimate(rng, n=64), torch.zeros(1000, dtype=torch.bfloat16)
    wide = gradient(estimate, "w", torch.zeros(1000))
    assert torch.equal(gradient(estimate, "w", parameter), wide.bfloat16())


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_one_parameter_at_a_time_equals_the_optimizer_fed_the_dense_gradient(rng, make):
    ours, theirs = parameters(rng), parameters(rng.manual_seed(0))
    update, optimizer = Update(make(list(ours.values())), {p: n for n, p in ours.items()}), make(list(theirs.values()))
    for step in range(3):
        estimate = an_estimate(rng, step=step)
        update.hold(estimate)
        update.step()
        for name, parameter in theirs.items():
            parameter.grad = gradient(estimate, name, parameter)
        optimizer.step()
    moved = 0
    for name in SHAPES:
        assert torch.equal(ours[name], theirs[name]), name
        moved += not torch.equal(ours[name], parameters(rng.manual_seed(0))[name])
    assert moved == (2 if isinstance(optimizer, torch.optim.Muon) else 4)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", LowRank(frozenset(["embed", "weight"]), 2)])
def test_gradients_made_together_are_those_made_alone(rng, kind):
    weights, estimate = parameters(rng), an_estimate(rng, distribution=kind)
    for name, together in gradients(estimate, weights).items():
        torch.testing.assert_close(together, gradient(estimate, name, weights[name]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [(1, [["embed"], ["weight"], ["bias", "scale"]]), (1 << 19, [["embed", "weight", "bias", "scale"]])],
    ids=["large", "small"],
)
def test_no_gradient_outlives_the_step_and_large_ones_are_not_there_together(rng, monkeypatch, chunk, expected):
    monkeypatch.setattr("zoo_hf.update.CHUNK", chunk)
    weights = parameters(rng)
    held = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            held.append([n for n, p in weights.items() if p.grad is not None])
            super().step(closure)

    Spy.__module__ = "torch.optim.sgd"
    update = Update(Spy(list(weights.values()), lr=0.1), {p: n for n, p in weights.items()})
    update.hold(an_estimate(rng))
    update.step()
    assert held == expected
    assert all(p.grad is None for p in weights.values())


def test_an_optimizer_that_is_not_known_to_treat_parameters_separately_gets_all_at_once(rng):
    weights = parameters(rng)
    steps = []

    class Together(torch.optim.SGD):
        def step(self, closure=None):
            steps.append(sum(p.grad is not None for p in weights.values()))

    update = Update(Together(list(weights.values()), lr=0.1), {p: n for n, p in weights.items()})
    update.hold(an_estimate(rng))
    update.step()
    assert steps == [4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooks_on_an_optimizer_are_called_by_steps_that_need_no_gradient_too(rng, dtype):
    named, called = parameters(rng, dtype), []
    optimizer = torch.optim.SGD(named.values(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    update = Update(optimizer, {p: n for n, p in named.items()})
    for step in range(2):
        update.hold(an_estimate(rng, step=step))
        update.step()
    assert called == ["before", "after"] * 2


def test_clipping_is_exact(rng):
    ours, theirs = parameters(rng), parameters(rng.manual_seed(0))
    update = Update(torch.optim.SGD(ours.values(), lr=1.0), {p: n for n, p in ours.items()})
    estimate = an_estimate(rng)
    for name, parameter in theirs.items():
        parameter.grad = gradient(estimate, name, parameter)
    expected = torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
    torch.optim.SGD(theirs.values(), lr=1.0).step()
    update.hold(estimate)
    assert update.clip_(0.5).item() == pytest.approx(expected.item(), rel=1e-6)
    assert expected > 0.5
    update.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


def test_a_long_limit_clips_nothing_and_a_new_estimate_starts_unclipped(rng):
    weights = parameters(rng)
    update = Update(torch.optim.SGD(weights.values(), lr=1.0), {p: n for n, p in weights.items()})
    update.hold(an_estimate(rng))
    update.clip_(1e6)
    assert update.clip == 1
    update.clip_(1e-3)
    assert update.clip < 1
    update.hold(an_estimate(rng))
    assert update.clip == 1


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (lambda p: torch.optim.LBFGS(p), "LBFGS .* evaluates the loss again"),
        (lambda p: torch.optim.SparseAdam(p), "SparseAdam .* sparse gradients"),
    ],
)
def test_optimizers_that_need_more_than_a_gradient_are_refused_with_the_reason(rng, optimizer, reason):
    weights = parameters(rng)
    with pytest.raises(ValueError, match=reason):
        Update(optimizer(list(weights.values())), {p: n for n, p in weights.items()})


def test_two_parameters_with_one_id_are_refused():
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="same 32-bit id"):
        Update(torch.optim.SGD([a, b], lr=0.1), {a: "plumless", b: "buckeroo"})


def test_state_survives_a_round_trip_through_tensors_and_primitives(rng, tmp_path):
    def one(weights):
        return Update(torch.optim.AdamW(weights.values(), lr=0.1), {p: n for n, p in weights.items()})

    ours, theirs = parameters(rng), parameters(rng.manual_seed(0))
    first, second = one(ours), one(theirs)
    first.hold(an_estimate(rng))
    first.step()
    first.forward_passes = 14
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert second.forward_passes == 14
    with torch.no_grad():
        for name in SHAPES:
            theirs[name].copy_(ours[name])
    estimate = an_estimate(rng, step=1)
    for update in (first, second):
        update.hold(estimate)
        update.step()
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


def an_update(rng, **settings):
    weights = parameters(rng)
    update = Update(torch.optim.SGD(weights.values(), lr=0.1, momentum=0.9), {p: n for n, p in weights.items()})
    update.settings = settings
    return update


def test_a_state_saved_under_other_settings_is_loaded_with_a_warning_for_each(rng, caplog):
    saved = an_update(rng, num_directions=4, distribution="rademacher", seed=1)
    now = an_update(rng, num_directions=8, distribution="gaussian", seed=1)
    now.load_state_dict(saved.state_dict())
    first, second = (record.message for record in caplog.records)
    assert first.startswith("`num_directions` is 8 now and was 4 when the checkpoint was made")
    assert first.endswith("Set `num_directions`=4 if that is what you want.")
    assert second.startswith("`distribution` is 'gaussian' now and was 'rademacher'")
    assert now.settings["num_directions"] == 8


def test_the_state_of_an_optimizer_that_had_gradients_is_taken_up_silently(rng, caplog):
    update, other = an_update(rng, seed=1), an_update(rng)
    for parameter in other.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    other.optimizer.step()
    update.load_state_dict(other.optimizer.state_dict())
    assert update.forward_passes == 0
    assert all(torch.equal(update.state[p]["momentum_buffer"], torch.ones_like(p)) for p in update.parameters.values())
    assert caplog.records == []


def test_parameters_of_another_model_are_refused(rng):
    weights = parameters(rng)
    with pytest.raises(ValueError, match="not the model's"):
        Update(torch.optim.SGD(weights.values(), lr=0.1), {})
