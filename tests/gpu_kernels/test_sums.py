"""Sums over all directions and SGD in one pass: Triton's kernels against their plain twins, and torch's SGD."""

import math

import pytest
import torch
from torch import nn

from zoo_hf.estimators import Estimate
from zoo_hf.gradients import gradient
from zoo_hf.kernels.choice import VARIABLE
from zoo_hf.kernels.rule import Rule, sgd_plainly_
from zoo_hf.noise import Direction, entries
from zoo_hf.update import Update

from .conftest import DEVICE, HALVES, LARGE, every_backend, every_dtype, needs_triton


pytestmark = needs_triton


NAMES = torch.tensor([[LARGE, 5, 0], [LARGE, 5, 7], [LARGE, 5, 2**31 + 3]], device=DEVICE)
COEFFICIENTS = torch.tensor([0.3, -1.7, 2.2], device=DEVICE)
RULES = {  # lr, momentum, dampening, weight decay, share of clipping, Nesterov's, first step
    "plain": [1e-2, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0],
    "decay and clipping": [1e-2, 0.0, 0.0, 0.1, 0.25, 0.0, 0.0],
    "first of momentum": [1e-2, 0.9, 0.5, 0.01, 1.0, 0.0, 1.0],
    "momentum": [1e-2, 0.9, 0.5, 0.01, 1.0, 0.0, 0.0],
    "nesterov": [1e-2, 0.9, 0.0, 0.0, 1.0, 1.0, 0.0],
}


@pytest.mark.parametrize("numel", [0, 1, 129, 8193])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_the_sum_in_registers_is_that_of_the_twin(both, numel, distribution):
    arguments = NAMES, COEFFICIENTS, "w", numel, distribution, torch.float32
    found, expected = both(torch.ops.zoo_hf.weighted_sum, *arguments)
    if distribution == "rademacher":
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=3e-6)
    alone = sum(
        c * entries(Direction(*name), "w", 0, numel, distribution=distribution)
        for name, c in zip(NAMES.tolist(), COEFFICIENTS.tolist(), strict=True)
    )
    torch.testing.assert_close(found.cpu(), alone, rtol=1e-5, atol=3e-6)


@every_dtype
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of Triton's interpreter
def test_the_fused_step_is_that_of_the_twin(both, rng, dtype, rule, distribution):
    start = torch.randn(2, 700, generator=rng).to(DEVICE, dtype)
    start[0, 3:6] = torch.tensor([torch.inf, -torch.inf, torch.nan])

    def run():
        weights, buffer = start.clone().unbind()
        arguments = NAMES, COEFFICIENTS, "w", distribution, rule
        torch.ops.zoo_hf.sgd_(weights, buffer if rule[1] else None, *arguments)
        return weights, buffer

    for found, expected, before in zip(*both(run), start, strict=True):
        # a product and a sum may be rounded once or twice; stochastic rounding then may fall to the other neighbour
        close = torch.isclose(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
        assert close.float().mean() > (0.99 if dtype in HALVES else 0.9999)
        torch.testing.assert_close(found, expected, rtol=0.01, atol=1e-3, equal_nan=True)
        moved = (found != before)[6:].float().mean()
        assert moved > 0.1 or not rule[1]


def test_the_compiler_sees_through_the_operations():
    names, coefficients = NAMES.cpu(), COEFFICIENTS.cpu()
    arguments = names, coefficients, "w", 300, "rademacher", torch.float32
    torch.library.opcheck(torch.ops.zoo_hf.weighted_sum.default, arguments)
    step = torch.zeros(300), torch.zeros(300), names, coefficients, "w", "rademacher", RULES["momentum"]
    torch.library.opcheck(torch.ops.zoo_hf.sgd_.default, step)


OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.8, "dampening": 0.3, "maximize": True},
]


def trained(options, dtype, steps=3, clip=None):
    """Weights and momentum of a parameter after some steps of an `Update`."""
    start = torch.randn(30, 10, generator=torch.Generator().manual_seed(0))
    parameter = nn.Parameter(start.to(DEVICE, dtype))
    update = Update(torch.optim.SGD([parameter], lr=0.01, **options), {parameter: "w"})
    for step in range(steps):
        directions = [Direction(1, step, i) for i in range(4)]
        update.hold(Estimate(directions, torch.tensor([0.5, math.nan, -0.7, 1.0]), 1.0))
        if clip:
            update.clip_(clip)
        update.step()
    return parameter.detach().float(), [state["momentum_buffer"].float() for state in update.state.values()]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("clip", [None, 3.0])
def test_an_update_in_one_pass_is_that_of_torchs_sgd(both, options, clip):
    (found, kept), (expected, momentum) = both(trained, options, torch.float32, clip=clip)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kept, momentum, rtol=1e-6, atol=1e-6)


@every_backend
@pytest.mark.parametrize("options", OPTIONS[:2])
def test_bfloat16_weights_follow_those_of_float32_on_average(monkeypatch, kernels, options):
    monkeypatch.setenv(VARIABLE, kernels)
    start = nn.Parameter(torch.ones(4000, device=DEVICE, dtype=torch.bfloat16))
    lr = 1e-4 * (1 - options.get("momentum", 0.0))
    update = Update(torch.optim.SGD([start], lr=lr, **options), {start: "w"})
    moved = torch.zeros(4000, device=DEVICE)
    velocity = torch.zeros(4000, device=DEVICE)
    for step in range(20):
        estimate = Estimate([Direction(1, step, 0)], torch.tensor([1.0]), 1.0)
        velocity = options.get("momentum", 0.0) * velocity + gradient(estimate, "w", moved)
        moved -= lr * velocity
        update.hold(estimate)
        update.step()
    error = start.detach().float() - 1 - moved
    # one step moves a weight by 1e-4, a fortieth of the spacing below 1, which rounding to the nearest undoes
    assert moved.abs().max() < 2**-8
    assert (start != 1).float().mean() > 0.03
    assert abs(error.mean()) < 4 * error.std() / len(error) ** 0.5
    assert error.std() > 1e-4
    assert (start.detach().float() - 1) @ moved > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_in_parts_is_that_of_the_whole(monkeypatch, rng, dtype):
    weights, buffer = torch.randn(2, 1000, generator=rng).to(dtype).unbind()
    gradient, rule, ends = torch.randn(1000, generator=rng), Rule(0.1, momentum=0.9), []
    for chunk in (1 << 19, 128):
        monkeypatch.setattr("zoo_hf.kernels.rule.CHUNK", chunk)
        own, moving = weights.clone(), buffer.clone()
        sgd_plainly_(own, moving, gradient.clone(), rule, name="w", seed=1, step=2)
        ends.append(torch.stack([own, moving]))
    assert torch.equal(*ends)
