"""Low-rank directions: their factors, their moments, the members and the update that are made of them."""

import pytest
import torch
from conftest import tiny_lstm
from peft import LoraConfig, get_peft_model
from test_trainer import tiny_gpt2, tiny_llama

from zoo_hf import CentralDifference, Direction, Estimate, Member, entries, gradient, perturbed, probe
from zoo_hf.low_rank import ENTRIES, LowRank, kind_of, matrix_names
from zoo_hf.noise import PURPOSE_LEFT, PURPOSE_RIGHT, Blocks, words_of
from zoo_hf.perturbation import Displacement


BOTH = pytest.mark.parametrize("factors", ["rademacher", "gaussian"])
RANKS = pytest.mark.parametrize("rank", [1, 3])
CPU = torch.device("cpu")
SHAPE = torch.Size([6, 5])


def names(count, step=0):
    return [Direction(seed=1, step=step, index=index) for index in range(count)]


def matrices(kind, directions, shape=SHAPE, name="w"):
    """E of every direction, (G, R, C)."""
    a, b = kind.factors(directions, {name: torch.empty(shape)})[name]
    return a.double() @ b.double().mT


def low_rank(factors="rademacher", rank=1, name="w"):
    return LowRank(frozenset([name]), rank, factors)


@BOTH
def test_rank_entries_and_moments(factors):
    for rank in (1, 3):
        e = matrices(low_rank(factors, rank), names(4000))
        assert torch.linalg.matrix_rank(e[:50]).max() <= rank
        flat = e.flatten(1)
        count = len(flat)
        # entries: mean 0, variance 1, uncorrelated; a product of standard normals has a fourth moment of 9 at most
        fourth = 1 if factors == "rademacher" and rank == 1 else 9
        assert flat.mean(0).abs().max() <= 4 * count**-0.5
        second = flat.T @ flat / count
        assert (second.diagonal() - 1).abs().max() <= 4 * ((fourth - 1) / count) ** 0.5 + 1e-12
        assert (second - second.diagonal().diag()).abs().max() <= 4 * (fourth / count) ** 0.5


def test_a_rademacher_direction_of_rank_one_is_a_matrix_of_signs():
    assert set(matrices(low_rank(), names(3)).unique().tolist()) == {-1.0, 1.0}


def test_the_streams_of_both_factors_and_of_full_directions_never_meet():
    found = [
        torch.cat(
            [torch.stack(words).flatten(1) for *_, words in words_of(names(2), [Blocks("w", 0, 50, purpose)], CPU)]
        ).T
        for purpose in (0, PURPOSE_LEFT, PURPOSE_RIGHT)
    ]
    everything = torch.cat(found)
    assert len(everything.unique(dim=0)) == len(everything)


@BOTH
def test_factors_of_a_direction_do_not_depend_on_what_is_made_beside_them(factors):
    kind = LowRank(frozenset("vw"), 2, factors)
    parameters = {"v": torch.empty(90, 3), "w": torch.empty(SHAPE)}
    together = kind.factors(names(4), parameters)
    for row, direction in enumerate(names(4)):
        for name, parameter in parameters.items():
            alone = kind.factors([direction], {name: parameter})[name]
            for whole, own in zip(together[name], alone, strict=True):
                assert torch.equal(whole[row], own[0])


def test_of_no_parameters_there_are_no_factors():
    assert low_rank().factors(names(2), {}) == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_factors_are_float32_whatever_the_default_dtype(dtype):
    kind = low_rank("gaussian", 2)
    expected = kind.factors(names(2), {"w": torch.empty(SHAPE)})["w"]
    torch.set_default_dtype(dtype)
    try:
        found = kind.factors(names(2), {"w": torch.empty(SHAPE)})["w"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_columns_are_the_last_dimension_and_rows_all_others():
    a, b = low_rank(rank=2).factors(names(3), {"w": torch.empty(4, 2, 5, 5)})["w"]
    assert a.shape == (3, 40, 2)
    assert b.shape == (3, 5, 2)


@BOTH
@RANKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_member_is_theta_plus_epsilon_e_and_theta_returns_bit_for_bit(factors, rank, dtype):
    kind = low_rank(factors, rank)
    weights = {"w": torch.randn(SHAPE).to(dtype), "b": torch.randn(7).to(dtype)}
    before, seen = {name: w.clone() for name, w in weights.items()}, []

    def objective():
        seen.append({name: w.clone() for name, w in weights.items()})
        return torch.zeros(())

    probe(objective, weights, [Member(d, s) for d in names(3) for s in (1, -1)], 0.25, distribution=kind)
    for number, displaced in enumerate(seen):
        direction, sign = names(3)[number // 2], 1 - 2 * (number % 2)
        expected = before["w"].double() + sign * 0.25 * matrices(kind, [direction])[0]
        tolerance = {"rtol": torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
        torch.testing.assert_close(displaced["w"].double(), expected, **tolerance)
        full = entries(direction, "b", 0, 7, distribution=factors, dtype=torch.promote_types(dtype, torch.float32))
        torch.testing.assert_close(displaced["b"], (before["b"].to(full.dtype) + sign * 0.25 * full).to(dtype))
    assert all(torch.equal(weights[name], before[name]) for name in weights)


def test_factors_that_are_not_held_give_the_same_members(monkeypatch):
    weights = {"w": torch.randn(40, 30)}
    expected = probe(lambda: weights["w"].sin().sum(), weights, [Member(names(1)[0], 1)], 0.1, distribution=low_rank())
    monkeypatch.setattr(Displacement, "_bytes", lambda self: 1e12)
    found = probe(lambda: weights["w"].sin().sum(), weights, [Member(names(1)[0], 1)], 0.1, distribution=low_rank())
    assert torch.equal(found, expected)


@BOTH
@RANKS
@pytest.mark.parametrize("shape", [(6, 5), (3, 2, 4, 4), (700, 300)])
def test_gradient_is_the_mean_of_coefficients_times_matrices(factors, rank, shape, rng):
    kind, directions = low_rank(factors, rank), names(40)
    coefficients = torch.randn(40, generator=rng)
    coefficients[3] = torch.nan
    used = [i for i in range(40) if i != 3]
    e = matrices(kind, [directions[i] for i in used], torch.Size(shape))
    expected = torch.einsum("g,grc->rc", coefficients[used].double(), e) / 39
    found = gradient(Estimate(directions, coefficients, 1.0, kind), "w", torch.zeros(shape))
    torch.testing.assert_close(found, expected.float().view(shape), rtol=0, atol=1e-5)


@BOTH
def test_estimate_of_a_linear_objective_is_unbiased(factors):
    gradient_, kind = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)), low_rank(factors)
    weights, count = {"w": torch.zeros(SHAPE)}, 4000
    estimate = CentralDifference(0.5, kind)(lambda: (weights["w"] * gradient_).sum(), weights, names(count))
    found = gradient(estimate, "w", weights["w"])
    e = matrices(kind, names(count))
    samples = estimate.coefficients.double()[:, None, None] * e
    error = samples.std(0) / count**0.5
    assert ((found - gradient_).abs() <= 4 * error).all()


def test_matrices_are_the_weights_of_linear_and_embedding_layers_and_of_our_cells():
    assert matrix_names(tiny_lstm()) == {
        "model.embed_tokens.weight",
        "model.layers.0.input_weight",
        "model.layers.0.recurrent_weight",
        "lm_head.weight",
    }
    gpt2 = tiny_gpt2()
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    others = {name for name, p in gpt2.named_parameters() if p.dim() < 2}
    assert matrix_names(gpt2) == {name for name, _ in gpt2.named_parameters()} - others
    llama = tiny_llama()
    assert not any("norm" in name for name in matrix_names(llama))
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2
    assert trained <= matrix_names(adapted)


def test_a_name_gives_low_rank_directions_and_others_stay_names():
    model = tiny_lstm()
    assert kind_of("gaussian", model, 3) == "gaussian"
    for name, factors in ENTRIES.items():
        assert kind_of(name, model, 3) == LowRank(matrix_names(model), 3, factors)


def test_perturbed_takes_low_rank_directions():
    weights = {"w": torch.zeros(SHAPE)}
    with perturbed(weights, names(1)[0], 0.5, distribution=low_rank()):
        assert set(weights["w"].abs().unique().tolist()) == {0.5}
        assert torch.linalg.matrix_rank(weights["w"]) == 1
    assert not weights["w"].any()
