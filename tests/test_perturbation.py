"""Probes: displaced by exactly what was asked, and put back bit for bit, whatever happens."""

import pytest
import torch

from zoo_hf.noise import PACKED_BYTES, Direction, entries
from zoo_hf.perturbation import Member, perturbed, probe, probing_mode, seeded, share_moved


DIRECTIONS = [Direction(seed=1, step=2, index=i) for i in range(3)]
PAIRS = [Member(direction, sign) for direction in DIRECTIONS for sign in (1, -1)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
BOTH = pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])


def some_weights(rng, dtype=torch.float32):
    shapes = {"embed.weight": (7, 130), "norm": (1,), "empty": (0, 4), "head.bias": (129,)}
    return {name: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def displaced(weights, member, radius, distribution):
    """θ + s ε z from `entries`, rounded once to the weights' dtype."""

    def one(name, weight):
        wide = torch.promote_types(weight.dtype, torch.float32)
        z = entries(member.direction, name, 0, weight.numel(), distribution=distribution, dtype=wide)
        return (weight.to(wide) + member.sign * radius * z.view_as(weight)).to(weight.dtype)

    return {name: one(name, weight) for name, weight in weights.items()}


@BOTH
@DTYPES
def test_a_member_is_theta_plus_epsilon_z_rounded_once_and_theta_returns_bit_for_bit(rng, dtype, distribution):
    weights = some_weights(rng, dtype)
    before = {name: weight.clone() for name, weight in weights.items()}
    seen = []

    def objective():
        seen.append({name: weight.clone() for name, weight in weights.items()})
        return torch.tensor(float(len(seen)))

    losses = probe(objective, weights, [*PAIRS, Member(DIRECTIONS[0], 0)], 0.01, distribution=distribution)
    assert losses.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert losses.dtype == torch.float64
    for member, values in zip(PAIRS, seen, strict=False):
        expected = displaced(before, member, 0.01, distribution)
        for name in weights:
            assert torch.equal(values[name], expected[name]), (member, name)
    assert all(torch.equal(seen[-1][name], before[name]) for name in weights)
    assert all(torch.equal(weights[name], before[name]) for name in weights)


@BOTH
def test_noise_held_for_several_directions_equals_noise_made_for_each(rng, distribution):
    large = {"w": torch.randn(PACKED_BYTES, generator=rng)}  # one direction of it is held (signs) or none (normals)
    target = torch.randn(PACKED_BYTES, generator=rng)
    together = probe(lambda: large["w"] @ target, large, PAIRS, 0.1, distribution=distribution)
    alone = [probe(lambda: large["w"] @ target, large, [member], 0.1, distribution=distribution) for member in PAIRS]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_objective_that_raises_leaves_theta_bit_for_bit(rng, error):
    weights = some_weights(rng)
    before = {name: weight.clone() for name, weight in weights.items()}

    def objective():
        assert not torch.equal(weights["norm"], before["norm"])
        raise error("in the middle of a pair")

    with pytest.raises(error, match="in the middle"):
        probe(objective, weights, PAIRS, 0.1)
    assert all(torch.equal(weights[name], before[name]) for name in weights)


def test_three_hundred_pairs_do_not_drift(rng):
    weights = some_weights(rng)
    before = {name: weight.clone() for name, weight in weights.items()}
    members = [Member(Direction(0, 0, i), sign) for i in range(300) for sign in (1, -1)]
    probe(lambda: weights["norm"].sum(), weights, members, 1e-3)
    assert all(torch.equal(weights[name], before[name]) for name in weights)


def test_perturbed_holds_the_displacement_inside_the_block_only(rng):
    weights = some_weights(rng)
    before = {name: weight.clone() for name, weight in weights.items()}
    with pytest.raises(ValueError, match="inside"), perturbed(weights, DIRECTIONS[0], -0.5):  # noqa: PT012
        expected = displaced(before, Member(DIRECTIONS[0], -1), 0.5, "rademacher")
        assert all(torch.equal(weights[name], expected[name]) for name in weights)
        raise ValueError("inside")
    assert all(torch.equal(weights[name], before[name]) for name in weights)


def test_gradients_inside_perturbed_are_those_at_the_displaced_weights(rng):
    w = torch.nn.Parameter(torch.randn(5, generator=rng))
    before = w.detach().clone()
    with perturbed({"w": w}, DIRECTIONS[0], 0.5):
        (gradient,) = torch.autograd.grad(w.pow(3).sum(), w)
    expected = displaced({"w": before}, Member(DIRECTIONS[0], 1), 0.5, "rademacher")["w"]
    torch.testing.assert_close(gradient, 3 * expected.square())
    assert torch.equal(w.detach(), before)
    assert w.grad is None
    assert w.requires_grad


def test_a_probe_keeps_no_graph(rng):
    w = torch.nn.Parameter(torch.randn(5, generator=rng))
    seen = []
    probe(lambda: seen.append(w.sum()) or seen[-1], {"w": w}, PAIRS[:1], 0.1)
    assert not seen[0].requires_grad


def test_what_cannot_be_displaced_or_differenced_is_refused(rng):
    weights = {"w": torch.randn(3, 4, generator=rng)}
    with pytest.raises(ValueError, match="'t' is not contiguous"):
        probe(lambda: weights["w"].sum(), {"t": weights["w"].T}, PAIRS, 0.1)
    with pytest.raises(ValueError, match=r"scalar, got a tensor of shape \(3,\)"):
        probe(lambda: weights["w"].sum(1), weights, PAIRS, 0.1)


def test_losses_keep_float64_resolution(rng):
    weights = {"w": torch.randn(1, generator=rng, dtype=torch.float64)}
    plus, minus = probe(lambda: 4 + 1e-10 * weights["w"].sum(), weights, PAIRS[:2], 0.5)
    assert plus != minus, "in float32 both would be 4"


@pytest.mark.parametrize("dropout", [False, True])
def test_probing_mode_puts_every_module_back(dropout):
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2), torch.nn.Dropout())
    model[2].eval()
    with pytest.raises(RuntimeError), probing_mode(model, dropout=dropout):  # noqa: PT012
        assert [module.training for module in model] == [dropout] * 3
        assert torch.is_inference_mode_enabled()
        raise RuntimeError
    assert [module.training for module in model] == [True, True, False]


class Outermost(torch.nn.Module):
    """A model that itself asks whether it is in training, and records the answers."""

    def __init__(self):
        super().__init__()
        self.answers = []

    def forward(self, fails=False):
        self.answers.append(self.training)
        assert not fails


@pytest.mark.parametrize("was", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_a_model_says_that_it_is_in_training_but_not_to_its_own_forward_pass(dropout, was):
    model = Outermost().train(was)
    with probing_mode(model, dropout=dropout):
        assert model.training, "trainers file what they measure by it"
        model()
        assert model.training
        with pytest.raises(AssertionError):
            model(fails=True)
        assert model.training
    model()
    assert model.answers == [dropout, dropout, was]
    assert model.training == was


@pytest.mark.parametrize("dropout", [False, True])
def test_a_bare_layer_is_probed_as_one_within_a_model(dropout):
    layer, norm, x = torch.nn.Dropout(), torch.nn.BatchNorm1d(4), torch.ones(64, 4)
    with probing_mode(layer, dropout=dropout), seeded(0, torch.device("cpu")):
        assert torch.equal(layer(x), x) != dropout
    with probing_mode(norm, dropout=dropout):
        norm(x)
    assert norm.num_batches_tracked == 0


def test_seeded_repeats_its_numbers_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    draws = []
    for seed in (3, 3, 4):
        with seeded(seed, torch.device("cpu")):
            draws.append(torch.rand(2).tolist())
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(before, torch.get_rng_state())


def test_seeded_on_the_cpu_does_not_reach_for_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.manual_seed_all", lambda seed: pytest.fail("a GPU's generator was seeded"))
    with seeded(3, torch.device("cpu")):
        pass


class TwoGPUs:
    """The random states of two devices, as torch's device modules have them."""

    def __init__(self):
        self.states = ["first", "second"]

    def device_count(self):
        return len(self.states)

    def manual_seed_all(self, seed):
        self.states = [seed, seed]

    def get_rng_state(self, device):
        return self.states[device]

    def set_rng_state(self, state, device):
        self.states[device] = state


def test_seeded_puts_the_generators_of_all_gpus_back(monkeypatch):
    gpus = TwoGPUs()
    monkeypatch.setattr("torch.get_device_module", lambda device: gpus)
    monkeypatch.setattr("torch.cuda.manual_seed_all", gpus.manual_seed_all)
    with pytest.raises(RuntimeError), seeded(3, torch.device("cuda:1")):  # noqa: PT012
        assert gpus.states == [3, 3]
        raise RuntimeError
    assert gpus.states == ["first", "second"]


def test_share_moved_counts_weights_that_feel_epsilon():
    ones = {"w": torch.ones(6), "v": torch.full((2,), 1e-4)}  # bfloat16's spacing above 1 is 2⁻⁷
    assert share_moved(ones, 1e-3) == 1
    assert share_moved(ones, 1e-3, torch.bfloat16) == 2 / 8
    assert share_moved(ones, 2.0**-7, torch.bfloat16) == 1
    assert share_moved({"w": torch.ones(4, dtype=torch.bfloat16)}, 1e-3) == 0
