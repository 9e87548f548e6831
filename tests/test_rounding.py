"""Stochastic rounding: one of the two neighbours, right on average, the same every time."""

import pytest
import torch

from zoo_hf.rounding import round_


def rounded(wide, name="w", seed=1, step=2, stream=0):
    out = torch.full(wide.shape, torch.nan, dtype=torch.bfloat16)
    round_(out, wide, name, seed=seed, step=step, stream=stream)
    return out


def test_a_number_becomes_one_of_its_two_neighbours(rng):
    wide = torch.randn(5000, generator=rng) * torch.logspace(-30, 30, 5000)
    found, nearest = rounded(wide).float(), wide.bfloat16().float()
    spacing = 2.0 ** (nearest.abs().log2().floor() - 7)
    assert ((found - wide).abs() < spacing).all()
    assert (found != nearest).float().mean() > 0.1


@pytest.mark.parametrize("number", [1.001, -3.14159, 0.2501, 100.3])
def test_the_mean_is_the_number_itself(number):
    wide = torch.full((100_000,), number)
    found = rounded(wide).double()
    error = found.std() / len(found) ** 0.5
    assert error > 0
    assert abs(found.mean() - wide[0].double()) < 4 * error


def test_numbers_of_bfloat16_stay_as_they_are(rng):
    exact = torch.cat([torch.randn(100, generator=rng).bfloat16().float(), torch.tensor([0.0, -0.0, 1.0])])
    assert torch.equal(rounded(exact).float(), exact)


def test_what_is_no_number_stays_so():
    found = rounded(torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0]))
    assert found[:2].tolist() == [torch.inf, -torch.inf]
    assert found[2].isnan()


def test_steps_parameters_and_streams_round_apart_and_again_the_same():
    wide = torch.full((1000,), 1.001)
    first = rounded(wide)
    assert torch.equal(rounded(wide), first)
    for other in ({"step": 3}, {"seed": 2}, {"name": "v"}, {"stream": 1}):
        assert not torch.equal(rounded(wide, **other), first), other


def test_a_part_is_rounded_as_in_the_whole(monkeypatch):
    wide = torch.full((1000,), 1.001)
    whole = rounded(wide)
    monkeypatch.setattr("zoo_hf.rounding.CHUNK", 96)
    assert torch.equal(rounded(wide), whole)
