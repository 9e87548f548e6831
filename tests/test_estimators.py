"""Estimators against their theory: exact where it is exact, within four standard errors where it is random."""

import math
import re

import pytest
import torch

from zoo_hf.estimators import CentralDifference, ForwardDifference
from zoo_hf.gradients import gradient
from zoo_hf.noise import Direction, entries


def directions(n, step=0, seed=0):
    return [Direction(seed=seed, step=step, index=i) for i in range(n)]


def matrix(names, size, distribution="rademacher"):
    """z of each direction, (n, size) float64."""
    return torch.stack([entries(d, "theta", 0, size, distribution=distribution, dtype=torch.float64) for d in names])


def smooth(theta):
    """A loss with derivatives of every order."""
    return (theta.sin() * torch.linspace(0.5, 1.5, len(theta), dtype=theta.dtype)).exp().sum()


def slope(radii, errors):
    """Order of a power law: slope of log error against log radius."""
    x, y = torch.tensor(radii).log(), torch.tensor(errors).log()
    return ((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()).item()


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_central_difference_is_exact_on_a_quadratic(rng, distribution):
    hessian = torch.randn(5, 5, generator=rng, dtype=torch.float64)
    theta = torch.randn(5, generator=rng, dtype=torch.float64)
    names = directions(8)
    central = CentralDifference(smoothing_radius=0.5, distribution=distribution)
    estimate = central(lambda: theta @ hessian @ theta, {"theta": theta}, names)
    expected = matrix(names, 5, distribution) @ (hessian + hessian.T) @ theta
    torch.testing.assert_close(estimate.coefficients, expected.float(), rtol=1e-6, atol=1e-6)


def test_forward_difference_errs_on_a_quadratic_by_epsilon_z_h_z(rng):
    hessian = torch.randn(5, 5, generator=rng, dtype=torch.float64)
    theta = torch.randn(5, generator=rng, dtype=torch.float64)
    names = directions(8)
    estimate = ForwardDifference(smoothing_radius=0.5)(lambda: theta @ hessian @ theta, {"theta": theta}, names)
    z = matrix(names, 5)
    expected = z @ (hessian + hessian.T) @ theta + 0.5 * torch.einsum("ni,ij,nj->n", z, hessian, z)
    torch.testing.assert_close(estimate.coefficients, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "order"), [(CentralDifference, 2), (ForwardDifference, 1)])
def test_a_coefficient_errs_by_its_order(rng, kind, order):
    theta = torch.randn(6, generator=rng, dtype=torch.float64)
    true = matrix(directions(16), 6) @ torch.func.grad(smooth)(theta)
    radii = [0.2, 0.1, 0.05, 0.025]
    errors = [
        (kind(radius)(lambda: smooth(theta), {"theta": theta}, directions(16)).coefficients - true).abs().mean().item()
        for radius in radii
    ]
    assert slope(radii, errors) == pytest.approx(order, abs=0.1)


def test_both_estimates_have_the_same_bias_of_order_two(rng):
    """All 2⁴ sign vectors give the expectation without sampling error."""
    theta = torch.randn(4, generator=rng, dtype=torch.float64)
    z = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4)  # (16, 4)
    true = torch.func.grad(smooth)(theta)

    def bias(kind, radius):
        names = directions(16)
        losses = torch.stack([smooth(theta + sign * radius * z[d.index]) for d, sign in kind(radius).members(names)])
        coefficients = kind(radius).estimate(names, losses).coefficients.double()
        return coefficients @ z / 16 - true

    radii = [0.4, 0.2, 0.1]
    errors = {kind: [bias(kind, radius) for radius in radii] for kind in (CentralDifference, ForwardDifference)}
    for central, forward in zip(*errors.values(), strict=True):
        torch.testing.assert_close(central, forward, rtol=0, atol=1e-5)
    assert slope(radii, [error.norm().item() for error in errors[CentralDifference]]) == pytest.approx(2, abs=0.1)


def test_gaussian_central_difference_is_unbiased_for_the_smoothed_loss():
    """L = θ⁴ in one dimension: d/dθ E L(θ + ε z) = 4θ³ + 12 ε² θ, while ∇L = 4θ³."""
    theta, radius, n = torch.tensor([0.7], dtype=torch.float64), 0.5, 3_000
    names = directions(n)
    central = CentralDifference(radius, "gaussian")
    coefficients = central(lambda: theta.pow(4).sum(), {"theta": theta}, names).coefficients.double()
    products = coefficients * matrix(names, 1, "gaussian").squeeze(1)
    expected = 4 * 0.7**3 + 12 * radius**2 * 0.7
    assert abs(products.mean().item() - expected) < 4 * products.std().item() / n**0.5
    assert abs(expected - 4 * 0.7**3) > 8 * products.std().item() / n**0.5, "the test could tell the two apart"


@pytest.mark.parametrize(("n", "d"), [(1, 64), (16, 64), (64, 64), (64, 1024)])
def test_cosine_to_the_gradient_follows_its_law(rng, n, d):
    """cos(ĝ, ∇L)² ≈ n / (n + d − 1) for Rademacher z, here on a linear loss, over 200 independent steps."""
    true = torch.randn(d, generator=rng, dtype=torch.float64)
    theta = torch.zeros(d, dtype=torch.float64)
    cosines = []
    for step in range(200):
        estimate = CentralDifference(1e-3)(lambda: theta @ true, {"theta": theta}, directions(n, step))
        cosines.append(torch.cosine_similarity(gradient(estimate, "theta", theta), true, dim=0))
    cosines = torch.stack(cosines)
    standard_error = cosines.std().item() / 200**0.5
    if n == 1:  # one direction: |cos| is |z·g| / √d |g|, whose mean is √(2/π) of the law's root mean square
        assert cosines.square().mean().item() == pytest.approx(1 / d, abs=4 * cosines.square().std().item() / 200**0.5)
    else:
        law = math.sqrt(n / (n + d - 1))
        assert abs(cosines.mean().item() - law) < 4 * standard_error + law / (2 * n), "the law is exact to O(1/n)"


def test_an_lstm_in_float64_agrees_with_autograd(rng):
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(3, 4, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 5, 3, generator=rng, dtype=torch.float64)
    parameters = dict(lstm.named_parameters())

    def loss():
        return lstm(x)[0].square().sum()

    grads = torch.autograd.grad(loss(), list(parameters.values()))
    names = directions(32)
    estimate = CentralDifference(1e-4)(loss, parameters, names)
    expected = [
        sum(
            (entries(d, name, 0, p.numel(), dtype=p.dtype) @ g.flatten()).item()
            for (name, p), g in zip(parameters.items(), grads, strict=True)
        )
        for d in names
    ]
    torch.testing.assert_close(estimate.coefficients, torch.tensor(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [CentralDifference, ForwardDifference])
def test_costs_and_order_of_members(kind):
    names = directions(3)
    members = kind(0.1).members(names)
    if kind is CentralDifference:
        assert [(d.index, sign) for d, sign in members] == [(0, 1), (0, -1), (1, 1), (1, -1), (2, 1), (2, -1)]
    else:
        assert [(d.index, sign) for d, sign in members] == [(0, 0), (0, 1), (1, 1), (2, 1)]


def test_coefficients_are_differenced_in_float64_and_rounded_once():
    losses = torch.tensor([4 + 1e-12, 4 - 1e-12], dtype=torch.float64)
    estimate = CentralDifference(1e-3).estimate(directions(1), losses)
    assert estimate.coefficients.dtype == torch.float32
    assert estimate.coefficients.item() == torch.tensor((losses[0] - losses[1]).item() / 2e-3).item() != 0


def test_a_pair_that_is_not_finite_is_left_out_and_counted():
    losses = torch.tensor([1.0, 3.0, math.nan, 2.0, 5.0, 1.0, 2.0, math.inf], dtype=torch.float64)
    estimate = CentralDifference(0.5).estimate(directions(4), losses)
    assert estimate.coefficients.tolist()[::2] == [-2, 4]
    assert estimate.coefficients.isnan().tolist() == [False, True, False, True]
    assert estimate.left_out == 0.5
    assert estimate.loss == 2.5
    z = matrix(directions(4), 6)
    assert torch.equal(gradient(estimate, "theta", torch.zeros(6)), ((-2 * z[0] + 4 * z[2]) / 2).float())


def test_more_than_half_left_out_stops_with_step_directions_and_losses():
    losses = torch.tensor([1.0, 3.0, math.nan, 2.0, 5.0, math.inf], dtype=torch.float64)
    with pytest.raises(FloatingPointError, match=r"Step 9: 2 of 3 pairs .* \{1: \[nan, 2.0\], 2: \[5.0, inf\]\}"):
        CentralDifference(0.5).estimate(directions(3, step=9), losses)
    with pytest.raises(FloatingPointError, match="2 of 2 pairs"):
        ForwardDifference(0.5).estimate(directions(2), torch.tensor([math.nan, 1.0, 2.0], dtype=torch.float64))


def test_of_many_pairs_left_out_the_first_eight_are_shown():
    losses = torch.full((512, 2), math.nan, dtype=torch.float64)
    losses[0] = 1.0
    with pytest.raises(FloatingPointError, match="511 of 512 pairs") as stopped:
        CentralDifference(0.5).estimate(directions(512), losses.flatten())
    assert re.findall(r"(\d+): \[", str(stopped.value)) == [str(index) for index in range(1, 9)]


def test_the_mean_loss_is_that_of_the_used_probes():
    losses = torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.float64)
    assert CentralDifference(0.5).estimate(directions(2), losses).loss == 4
    assert ForwardDifference(0.5).estimate(directions(3), losses).loss == 3  # (3 + 5 + 7)/3 and 1, half each


@pytest.mark.parametrize("estimator", [CentralDifference, ForwardDifference])
@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e4])
def test_normalized_coefficients_do_not_depend_on_the_scale_of_the_loss(estimator, scale, rng):
    directions = [Direction(0, 0, i) for i in range(16)]
    made = estimator(1e-3, normalize="loss_std")
    losses = 2 + 1e-3 * torch.randn(len(made.members(directions)), generator=rng, dtype=torch.float64)
    expected = made.estimate(directions, losses).coefficients
    torch.testing.assert_close(
        made.estimate(directions, 5 + scale * losses).coefficients, expected, rtol=1e-4, atol=1e-6
    )
    plain = estimator(1e-3).estimate(directions, losses).coefficients
    torch.testing.assert_close(expected, plain / (losses.std() / 1e-3).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("estimator", [CentralDifference, ForwardDifference])
def test_losses_that_are_all_equal_have_no_length(estimator):
    directions = [Direction(0, 0, i) for i in range(3)]
    made = estimator(1e-3, normalize="loss_std")
    losses = torch.full((len(made.members(directions)),), 3.0, dtype=torch.float64)
    assert made.estimate(directions, losses).coefficients.tolist() == [0.0] * 3


def test_signal_to_noise_is_that_of_slopes_over_curvature(rng):
    d, n, radius = 40, 2000, 0.05
    slope, hessian = (
        torch.randn(d, generator=rng, dtype=torch.float64),
        torch.diag(torch.rand(d, generator=rng)).double(),
    )
    hessian[0, 1] = hessian[1, 0] = 3.0  # zᵀHz of signs varies by what is off the diagonal alone
    theta = {"theta": torch.zeros(d, dtype=torch.float64)}
    directions = [Direction(0, 0, i) for i in range(n)]

    def loss():
        return theta["theta"] @ slope + theta["theta"] @ hessian @ theta["theta"] / 2

    found = CentralDifference(radius)(loss, theta, directions).signal_to_noise
    # var zᵀg = |g|², var zᵀHz/2 = 3²
    expected = radius * slope.norm().item() / (radius**2 * 3.0)
    assert found == pytest.approx(expected, rel=4 / (2 * n) ** 0.5)


def test_losses_that_are_noise_have_a_signal_near_one(rng):
    directions = [Direction(0, 0, i) for i in range(2000)]
    losses = torch.randn(4000, generator=rng, dtype=torch.float64)
    assert CentralDifference(1.0).estimate(directions, losses).signal_to_noise == pytest.approx(1, abs=4 / 2000**0.5)
