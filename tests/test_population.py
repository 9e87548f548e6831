"""A population gives the losses of its members one by one; what cannot be run as one is said, and run serially."""

import logging

import pytest
import torch
import torch.nn.functional as F
from conftest import Estimates, batch, texts, tiny_lstm, weights
from peft import LoraConfig, get_peft_model
from small_models import SMALL
from test_trainer import tiny_gpt2, tiny_llama
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from zoo_hf import Direction, Member, ZOOTrainer, probe
from zoo_hf.low_rank import kind_of
from zoo_hf.perturbation import probing_mode, seeded
from zoo_hf.population import DisplacedMatrix, dense, probe_population
from zoo_hf.probes import Probes


RADIUS = 1e-3
DIRECTIONS = [Direction(0, 3, index) for index in range(4)]
MEMBERS = [Member(direction, sign) for direction in DIRECTIONS for sign in (1, -1)]
TOLERANCE = 0.01  # of the coefficients' root mean square
OF_TRANSFORMERS = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0},
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "head_dim": 4}
    | {"num_key_value_heads": 2},
    "mamba": {"hidden_size": 16, "state_size": 4},
    "mamba2": {"hidden_size": 16, "state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
    "falcon_mamba": {"hidden_size": 16, "state_size": 4},
    "rwkv": {"hidden_size": 16, "intermediate_size": 24, "attention_hidden_size": 16, "rescale_every": 0},
}

every_distribution = pytest.mark.parametrize(
    "distribution", ["rademacher", "gaussian", "low_rank", "low_rank_gaussian"]
)
both_ranks = pytest.mark.parametrize("distribution", ["rademacher", "low_rank"])


def of_transformers(name, **config):
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2} if name != "gpt2" else {}
    sizes = {"vocab_size": 11, "pad_token_id": 0} | layers | OF_TRANSFORMERS[name]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(sizes | config))).eval()


def loss_of(model, inputs=None):
    """An objective: the model's loss of a batch that has padding on the left."""
    ids = torch.randint(1, 11, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    inputs = inputs or {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)}
    return lambda: model(**inputs, use_cache=False).loss


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def coefficients(losses, radius=RADIUS):
    return (losses[::2] - losses[1::2]) / (2 * radius)


def both_ways(model, distribution, objective=None, rank=2, radius=RADIUS, size=5):
    """Coefficients by members one at a time, and in populations of five."""
    kind, objective = kind_of(distribution, model, rank), objective or loss_of(model)
    with torch.inference_mode():
        serial = probe(objective, trained(model), MEMBERS, radius, distribution=kind)
        population = probe_population(
            objective, trained(model), MEMBERS, radius, model=model, members_per_forward=size, distribution=kind
        )
    return coefficients(serial, radius), coefficients(population, radius)


def near(found, expected, tolerance=TOLERANCE):
    assert (found - expected).abs().max() <= tolerance * expected.square().mean().sqrt()


@pytest.mark.parametrize("name", SMALL)
@every_distribution
def test_a_population_of_our_models_has_the_coefficients_of_its_members(name, distribution):
    torch.manual_seed(0)
    serial, population = both_ways(SMALL[name]().eval(), distribution)
    near(population, serial)


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
@every_distribution
def test_and_so_has_one_of_models_of_transformers(name, distribution):
    serial, population = both_ways(of_transformers(name), distribution)
    near(population, serial)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
@both_ranks
def test_and_one_with_a_tied_head(name, distribution):
    model = of_transformers(name, tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    serial, population = both_ways(model, distribution)
    near(population, serial)


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
@both_ranks
def test_and_one_of_lora_adapters(name, distribution):
    torch.manual_seed(0)
    # large enough for differences that a float32 loss resolves
    large = {"r": 2, "lora_alpha": 200, "init_lora_weights": False, "fan_in_fan_out": name == "gpt2"}
    targets = {"gpt2": "c_attn", "llama": "v_proj", "qwen3": "v_proj", "rwkv": "key"}.get(name, "in_proj")
    adapted = get_peft_model(of_transformers(name), LoraConfig(target_modules=[targets], **large))
    frozen = {name: p.clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    serial, population = both_ways(adapted, distribution)
    near(population, serial)
    assert all(torch.equal(p, frozen[name]) for name, p in adapted.named_parameters() if name in frozen)


@pytest.mark.parametrize("name", [*SMALL, *OF_TRANSFORMERS])
@both_ranks
def test_in_bfloat16_coefficients_correlate_with_those_of_float32(name, distribution):
    torch.manual_seed(0)
    model = SMALL[name]().eval() if name in SMALL else of_transformers(name)
    many = [Member(Direction(0, 3, index), sign) for index in range(24) for sign in (1, -1)]
    kind, found = kind_of(distribution, model, 1), {}
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(torch.bfloat16).to(dtype)  # both of the same weights
        arguments = {"model": model, "members_per_forward": 48, "distribution": kind}
        with torch.inference_mode():
            found[dtype] = coefficients(
                probe_population(loss_of(model), trained(model), many, 1e-2, **arguments), 1e-2
            )
    pair = torch.stack(list(found.values()))
    assert torch.corrcoef(pair)[0, 1] >= 0.95


@both_ranks
@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_any_number_of_members_in_a_forward_pass_gives_the_same_losses(distribution, size):
    serial, population = both_ways(tiny_lstm(), distribution, size=size)
    near(population, serial)


@both_ranks
def test_theta_is_never_written(distribution):
    model = tiny_llama().eval()
    before, versions = weights(model), {name: p._version for name, p in model.named_parameters()}
    both = trained(model)
    with torch.no_grad():
        kind = kind_of(distribution, model, 1)
        arguments = {"model": model, "members_per_forward": 8, "distribution": kind}
        probe_population(loss_of(model), both, MEMBERS, RADIUS, **arguments)
    assert {name: p._version for name, p in model.named_parameters()} == versions
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(model.get_parameter(name) is p for name, p in both.items())


def test_members_matrices_are_never_made_where_a_layer_multiplies(monkeypatch):
    made = []
    original = dense
    monkeypatch.setattr(
        "zoo_hf.population.dense",
        lambda v: (made.append(v.base.shape) if type(v) is DisplacedMatrix else 0, original(v))[1],
    )
    for model in (tiny_llama(), tiny_gpt2()):
        both_ways(model.eval(), "low_rank")
    assert made == []
    both_ways(tiny_lstm().eval(), "low_rank")
    assert {len(shape) for shape in made} == {4}, "of an LSTM, R alone"


@pytest.mark.parametrize(
    "use",
    [
        lambda w, x: F.linear(x, w),
        lambda w, x: F.linear(x, w, torch.arange(6.0)),
        lambda w, x: F.linear(x[0], w),
        lambda w, x: F.linear(x[0, 0], w),
        lambda w, x: F.linear(w, torch.ones(2, 5)),
        lambda w, x: F.linear(w, w),
        lambda w, x: F.linear(input=x, weight=w, bias=torch.arange(6.0)),
        lambda w, x: torch.addmm(torch.arange(5.0), x[0] @ torch.ones(5, 6), w, beta=0.5, alpha=2.0),
        lambda w, x: F.embedding(torch.tensor([[0, 5, 5]]), w),
        lambda w, x: torch.addmm(torch.arange(5.0), x[0] @ torch.ones(5, 6), w),
        lambda w, x: x @ w.mT,
        lambda w, x: w.to(torch.float64).sum(),
        lambda w, x: w[2:4] * 2,
        lambda w, x: torch.cat([w, w]),
        lambda w, x: torch.full(w.shape, float(len(w) * w.dim() * w.size(1))) + w.new_zeros(1),
        lambda w, x: (-w).abs().max(),
    ],
)
def test_a_displaced_matrix_is_w_plus_a_b(use):
    base, x = torch.randn(6, 5), torch.randn(2, 3, 5)
    left, right = torch.randn(6, 2), torch.randn(5, 2)
    found = use(DisplacedMatrix(base, left, right), x)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, use(base + left @ right.mT, x), rtol=1e-5, atol=1e-5)


@both_ranks
def test_all_members_share_the_dropout_masks_that_serial_members_have(distribution):
    model = tiny_gpt2(dropout=0.5)

    def objective():
        with seeded(5, torch.device("cpu")):
            return loss_of(model)()

    with probing_mode(model, dropout=True):
        serial, population = both_ways(model, distribution, objective)
        still, _ = both_ways(model.eval(), distribution)
    near(population, serial)
    assert (serial - still).abs().max() > 0.05 * still.square().mean().sqrt()


class Stubborn(nn.Module):
    """A model that asks for a number in the midst of its work, which a population has many of."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5))

    def forward(self):
        return self.weight.square().sum() * self.weight.sum().item()


def of_probes(choice, model, objective, members=MEMBERS, **arguments):
    probes = Probes(choice, **arguments)
    return probes, probes.losses(objective, trained(model), members, RADIUS, model=model, distribution="rademacher")


def test_auto_says_once_which_operation_failed_and_goes_on_serially(caplog):
    model = Stubborn()
    with caplog.at_level(logging.WARNING, logger="zoo_hf"), torch.inference_mode():
        probes, losses = of_probes("auto", model, model)
        again = probes.losses(model, trained(model), MEMBERS, RADIUS, model=model, distribution="rademacher")
        expected = probe(model, trained(model), MEMBERS, RADIUS)
    (record,) = caplog.records
    assert ".item()" in record.message
    assert probes.chosen == {0: 1}
    assert torch.equal(losses, expected)
    assert torch.equal(again, expected)


def test_a_population_that_was_asked_for_and_cannot_be_is_an_error():
    model = Stubborn()
    with (
        pytest.raises(RuntimeError, match=r"probes='population': .*\.item\(\).*Use probes='serial'"),
        torch.inference_mode(),
    ):
        of_probes("population", model, model)


def test_an_error_of_the_objective_itself_is_raised_as_it_is():
    model = tiny_lstm()

    def objective():
        raise ZeroDivisionError("of the user")

    with pytest.raises(ZeroDivisionError, match="of the user"), torch.inference_mode():
        of_probes("auto", model, objective)


def test_a_population_that_does_not_fit_is_halved_until_it_does(caplog):
    model = tiny_lstm().eval()
    before, plain = weights(model), loss_of(model)
    sizes = []

    def objective():
        members = torch._C._functorch.get_unwrapped(model.lm_head.weight).shape[0]  # the axis that vmap hides
        sizes.append(members)
        if members > 2:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")
        return plain()

    with caplog.at_level(logging.WARNING, logger="zoo_hf"), torch.inference_mode():
        probes, losses = of_probes("population", model, objective, members_per_forward=8)
        expected = probe(plain, trained(model), MEMBERS, RADIUS)
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert probes.chosen == {0: 2}
    assert ["20.00 GiB" in record.message for record in caplog.records] == [True, True]
    near(coefficients(losses), coefficients(expected))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@both_ranks
def test_training_with_a_population_ends_near_the_weights_of_serial_training(trainer, distribution):
    ends = {}
    for probes in ("serial", "population"):
        run = trainer(tiny_llama(), texts(8), probes=probes, distribution=distribution, max_steps=4)
        before = weights(run.model)
        run.train()
        assert set(run._probes.chosen.values()) == {1 if probes == "serial" else 8}
        ends[probes] = torch.cat([(p.detach() - before[name]).flatten() for name, p in run.model.named_parameters()])
    difference = (ends["population"] - ends["serial"]).norm() / ends["serial"].norm()
    assert 0 < difference < 0.01, "and not by the same way"


def test_the_choice_is_kept_by_a_checkpoint_and_taken_up_when_resumed(trainer, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "probes": "auto", "num_directions": 4}
    whole = trainer(tiny_llama(), texts(16), **arguments)
    whole.train()
    numbers = 2 * 4 * 8  # ids and labels of four texts of eight tokens
    assert whole._probes.chosen == {numbers: 8}
    path = tmp_path / "checkpoint-2" / "optimizer.pt"
    saved = torch.load(path)
    assert saved["zoo"]["population"] == {numbers: 8}
    saved["zoo"]["population"] = {numbers: 3}  # as another version's rule might have had it
    torch.save(saved, path)
    resumed = trainer(tiny_llama(), texts(16), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed._probes.chosen == {numbers: 3}


@pytest.mark.parametrize(
    ("make", "count", "chosen"),
    [
        (tiny_llama, 8, 8),
        (lambda: SMALL["rwkv7"](), 8, 8),
        (lambda: SMALL["slstm, two heads, learned state"](), 8, 8),
        (tiny_llama, 1, 1),
        (lambda: tiny_lstm(embedding_size=256, hidden_size=512), 8, 1),
    ],
    ids=["llama", "rwkv7", "slstm", "one member", "a large LSTM"],
)
def test_auto_takes_a_population_where_overhead_outweighs_arithmetic(make, count, chosen):
    model = make().eval()
    with torch.inference_mode():
        probes, _ = of_probes("auto", model, loss_of(model), MEMBERS[:count])
    assert probes.chosen == {0: chosen}


def test_a_population_is_no_larger_than_what_may_be_added_to_memory(monkeypatch):
    model = tiny_llama().eval()
    for room, most in ((10**9, 8), (200_000, 4), (0, 1)):
        monkeypatch.setattr("zoo_hf.probes.ADDED_BYTES", room)
        with torch.inference_mode():
            probes, _ = of_probes("auto", model, loss_of(model))
        assert probes.chosen[0] <= most


def test_a_larger_batch_gets_a_population_of_its_own(trainer, monkeypatch):
    monkeypatch.setattr("zoo_hf.probes.ADDED_BYTES", 1_000_000)
    model = tiny_llama()
    run = trainer(model, texts(4), probes="auto")
    for rows in (1, 32):
        inputs = batch(texts(rows, 16))
        run.training_step(model, inputs, torch.tensor(15 * rows))
        run.optimizer.step()
    few, many = run._probes.chosen.values()
    assert few == 8 > many


def test_ranks_choose_by_all_members_and_not_by_their_share():
    model = tiny_llama().eval()
    choices = []
    for share in (MEMBERS, MEMBERS[:2]):
        probes = Probes("auto")
        with torch.inference_mode():
            how = {"model": model, "distribution": "rademacher", "of": (len(MEMBERS), 54)}
            probes.losses(loss_of(model), trained(model), share, RADIUS, **how)
        choices.append(probes.chosen)
    assert choices[0] == choices[1] == {54: 8}


class Stateful(nn.Module):
    """A model that keeps a running mean of what it sees, as a buffer and in an attribute."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.register_buffer("seen", torch.zeros(()))
        self.last = torch.zeros(())

    def forward(self, input_ids, labels):
        hidden = self.embedding(input_ids)
        self.seen, self.last = 0.9 * self.seen + hidden.detach().mean(), hidden.detach().mean()
        return {"loss": F.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())}


def test_a_model_that_keeps_what_it_sees_is_probed_serially(trainer, caplog):
    examples = [{"input_ids": row["input_ids"] % 11, "labels": row["labels"] % 11} for row in texts(8)]
    run = trainer(Stateful(), examples, probes="auto")
    with caplog.at_level(logging.WARNING, logger="zoo_hf"):
        run.train()
    (record,) = (record for record in caplog.records if record.name == "zoo_hf.probes")
    assert "a forward pass sets last, seen in the model" in record.message
    assert run.model.seen.shape == run.model.last.shape == ()
    assert float(run.model.seen) != 0


class Recording(ZOOTrainer):
    """Its own `compute_loss` keeps the losses that it sees."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses = [*vars(self).get("losses", []), loss.detach()]
        return loss


@pytest.mark.parametrize("hooked", [False, True], ids=["compute_loss", "hook"])
def test_those_who_see_every_probe_see_one_member_at_a_time_unless_asked(config, hooked):
    seen = []
    run = (ZOOTrainer if hooked else Recording)(tiny_llama(), config(probes="auto"), train_dataset=texts(8))
    if hooked:
        run.model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    run.train()
    losses = seen if hooked else run.losses
    assert len(losses) == 2 * 8, "two steps of eight members"
    assert torch.stack(losses).isfinite().all()


@pytest.mark.parametrize("kind", ["rademacher", "low_rank"])
def test_attention_of_a_population_under_autocast(trainer, kind):
    ends = {}
    for probes in ("serial", "population"):
        run = trainer(tiny_llama(), texts(8), probes=probes, bf16=True, distribution=kind, smoothing_radius=0.05)
        estimates = Estimates()
        run.add_callback(estimates)
        run.train()
        ends[probes] = torch.cat([estimate.coefficients for estimate in estimates.seen])
    assert torch.corrcoef(torch.stack(list(ends.values())))[0, 1] > 0.95
