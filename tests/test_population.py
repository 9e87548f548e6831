"""A population gives the losses of its members one by one; what cannot be run as one is said, and run serially."""

import contextlib
import logging

import pytest
import torch
import torch.nn.functional as F
from conftest import Estimates, batch, texts, tiny_lstm, weights
from peft import LoraConfig, get_peft_model
from small_models import SMALL
from test_trainer import tiny_gpt2, tiny_llama
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from zoo_hf import CentralDifference, Direction, ForwardDifference, Member, ZOOTrainer, probe
from zoo_hf.displaced import DisplacedMatrix, dense
from zoo_hf.failures import out_of_memory
from zoo_hf.low_rank import kind_of
from zoo_hf.meter import work
from zoo_hf.perturbation import probing_mode, seeded
from zoo_hf.population import evaluate, member_weights, probe_population
from zoo_hf.prediction import FEW
from zoo_hf.probes import EVERY, Probes


RADIUS = 1e-3
DIRECTIONS = [Direction(0, 3, index) for index in range(4)]
MEMBERS = [Member(direction, sign) for direction in DIRECTIONS for sign in (1, -1)]
MANY = [Member(Direction(0, 3, index), sign) for index in range(FEW) for sign in (1, -1)]  # enough for `auto`
KEY = Probes("auto").key({})  # of a batch without tensors
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


def both_ways(model, distribution, objective=None, rank=2, radius=RADIUS, size=5, members=MEMBERS):
    """Coefficients by members one at a time, and in populations of five."""
    kind, objective = kind_of(distribution, model, rank), objective or loss_of(model)
    with torch.inference_mode():
        serial = probe(objective, trained(model), members, radius, distribution=kind)
        population = probe_population(
            objective, trained(model), members, radius, model=model, members_per_forward=size, distribution=kind
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


def of_t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)).eval()


@pytest.mark.parametrize("name", [*SMALL, *OF_TRANSFORMERS, "t5"])
@both_ranks
def test_under_autocast_a_population_is_as_near_to_float32_as_serial_members_are(name, distribution):
    torch.manual_seed(0)
    model = SMALL[name]().eval() if name in SMALL else of_t5() if name == "t5" else of_transformers(name)
    ids = torch.randint(1, 11, (3, 9), generator=torch.Generator().manual_seed(1))
    plain = loss_of(model, {"input_ids": ids, "labels": ids})

    def narrow():
        with torch.autocast("cpu", torch.bfloat16):
            return plain()

    both = {"radius": 1e-2, "members": MANY, "size": len(MANY)}
    exact, _ = both_ways(model, distribution, plain, **both)
    errors = [(found - exact).square().mean().sqrt() for found in both_ways(model, distribution, narrow, **both)]
    assert errors[1] <= 3 * errors[0]


class Normed(nn.Module):
    """Norms whose weights are float32, of bfloat16 activations that they give back in bfloat16."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.LayerNorm(6), nn.GroupNorm(2, 6)
        self.register_buffer("x", torch.randn(4, 6))

    def forward(self):
        normed = self.second(self.first(self.x.bfloat16()))
        assert normed.dtype == torch.bfloat16
        return normed.float().square().mean()


def test_norms_with_weights_wider_than_their_input_give_what_they_give_alone():
    model = Normed()
    with torch.inference_mode():
        serial = probe(model, trained(model), MEMBERS, 0.1)
        population = probe_population(model, trained(model), MEMBERS, 0.1, model=model, members_per_forward=8)
    torch.testing.assert_close(population, serial, rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@every_distribution
def test_the_default_dtype_changes_nothing(distribution, dtype):
    model = tiny_lstm().eval()
    expected, found = both_ways(model, distribution), None
    torch.set_default_dtype(dtype)
    try:
        found = both_ways(model, distribution)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


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
        "zoo_hf.displaced.dense",
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
        lambda w, x: F.linear(x[:0], w),
        lambda w, x: F.linear(x[:, :0], w, torch.arange(6.0)),
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


def of_probes(choice, model, objective, members=MANY, batch=None, watched=False, **arguments):
    probes = Probes(choice, **arguments)
    how = {"model": model, "distribution": "rademacher", "batch": batch, "watched": watched}
    return probes, probes.losses(objective, trained(model), members, RADIUS, **how)


def test_auto_says_once_which_operation_failed_where_and_goes_on_serially(caplog):
    model = Stubborn()
    with caplog.at_level(logging.WARNING, logger="zoo_hf"), torch.inference_mode():
        probes, losses = of_probes("auto", model, model)
        how = {"model": model, "distribution": "rademacher", "batch": {"x": torch.zeros(3)}}  # of another shape
        again = probes.losses(model, trained(model), MANY, RADIUS, **how)
        expected = probe(model, trained(model), MANY, RADIUS)
    (record,) = caplog.records
    line = Stubborn.forward.__code__.co_firstlineno + 1
    assert ".item()" in record.message
    assert record.message.endswith(f"; {__file__}, line {line}, in forward")
    assert "file a" not in record.message
    assert probes.chosen[EVERY] == 1
    assert torch.equal(losses, expected)
    assert torch.equal(again, expected)


def test_a_population_that_was_asked_for_and_cannot_be_is_an_error():
    model = Stubborn()
    with (
        pytest.raises(RuntimeError, match=r"probes='population': .*\.item\(\).*, in forward\)\. Use probes='serial'"),
        torch.inference_mode(),
    ):
        of_probes("population", model, model)


class Embedded(nn.Module):
    """An embedding that shortens its rows when it looks them up, or a function of it that does."""

    def __init__(self, by_module):
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Embedding(7, 4, max_norm=0.5 if by_module else None)
        self.max_norm = 0.5

    def forward(self):
        ids = torch.arange(3)
        found = self.rows(ids) if self.rows.max_norm else F.embedding(ids, self.rows.weight, max_norm=self.max_norm)
        return found.square().sum()


@pytest.mark.parametrize("by_module", [True, False], ids=["module", "function"])
def test_an_embedding_that_writes_its_weight_is_refused_before_it_does(by_module):
    model = Embedded(by_module)
    before = weights(model)
    with pytest.raises(ValueError, match=r"max_norm=0.5 makes .* set `max_norm=None`"), torch.inference_mode():
        probe_population(
            model,
            trained(model),
            MEMBERS,
            RADIUS,
            model=model,
            members_per_forward=8,
            distribution=kind_of("low_rank", model, 1),
        )
    assert torch.equal(model.rows.weight, before["rows.weight"])


@pytest.mark.parametrize("by_module", [True, False], ids=["module", "function"])
@pytest.mark.parametrize("probes", ["auto", "population"])
def test_what_writes_its_weight_when_it_is_measured_finds_it_put_back(by_module, probes, monkeypatch):
    model = Embedded(by_module)
    before = weights(model)
    monkeypatch.setattr("zoo_hf.probes.may_pay", lambda *_: True)
    with contextlib.suppress(RuntimeError), torch.inference_mode():
        of_probes(probes, model, model, MANY)
    assert torch.equal(model.rows.weight, before["rows.weight"])


def test_an_error_of_the_objective_itself_is_raised_as_it_is():
    model = tiny_lstm()

    def objective():
        raise ZeroDivisionError("of the user")

    with pytest.raises(ZeroDivisionError, match="of the user"), torch.inference_mode():
        of_probes("auto", model, objective)


class Full:
    """An objective that takes too much memory for more than a number of members."""

    def __init__(self, model, most):
        self.model, self.plain, self.most, self.sizes = model, loss_of(model), most, []

    def __call__(self):
        weight = self.model.lm_head.weight
        together = torch._C._functorch.is_batchedtensor(weight)  # it has the axis that vmap hides
        self.sizes.append(torch._C._functorch.get_unwrapped(weight).shape[0] if together else 1)
        if self.sizes[-1] > self.most:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")
        return self.plain()


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (2, [1, 2, 8, 4, 2, 2, 2, 2]),
        (1, [1, 2] + 8 * [1]),
    ],
)
def test_a_population_that_does_not_fit_is_halved_until_it_does(most, sizes, caplog):
    model = tiny_lstm().eval()
    before, objective = weights(model), Full(model, most)
    with caplog.at_level(logging.WARNING, logger="zoo_hf"), torch.inference_mode():
        probes, losses = of_probes("population", model, objective, MEMBERS, members_per_forward=8)
        expected = probe(objective.plain, trained(model), MEMBERS, RADIUS)
    assert objective.sizes == sizes
    assert probes.chosen == {probes.key({}): most}
    assert caplog.records
    assert all("does not fit into memory (Tried to allocate 20.00 GiB.)" in r.message for r in caplog.records)
    near(coefficients(losses), coefficients(expected))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_for_auto_too_a_population_that_does_not_fit_when_it_is_measured_is_no_failure(caplog):
    model = tiny_llama().eval()
    objective = Full(model, 1)
    with caplog.at_level(logging.WARNING, logger="zoo_hf"), torch.inference_mode():
        probes, _ = of_probes("auto", model, objective)
    assert probes.chosen == {KEY: 1}
    (record,) = caplog.records
    assert "A population of 2 members does not fit into memory" in record.message


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_what_an_allocator_says_when_it_gives_up(error, full):
    assert out_of_memory(error) == full


def test_what_a_population_should_hold_is_foreseen_also_for_as_many_members_as_were_asked_for(caplog):
    model = tiny_llama().eval()
    short, long = ({"input_ids": ids, "labels": ids} for ids in (torch.ones(3, 9).long(), torch.ones(4, 16).long()))
    with caplog.at_level(logging.INFO, logger="zoo_hf"), torch.inference_mode():
        probes, _ = of_probes("population", model, loss_of(model, short), batch=short, members_per_forward=8)
        held = member_weights(trained(model), MEMBERS, RADIUS, "rademacher")
        peak = work(lambda: evaluate(loss_of(model, long), model, held)).peak
    expected = peak + 1.5 * sum(value.nbytes for (value,) in held.own.values())  # noise is half of the weights
    assert probes.predicted.keys() == {probes.key(long)}
    assert expected <= 1e6 * probes.predicted[probes.key(long)] <= 2 * expected
    (record,) = caplog.records
    assert "8 members a forward pass; a population of 8 would hold about" in record.message


@pytest.mark.parametrize(
    ("most", "room", "members"),
    [(1, None, MEMBERS), (None, 0, MEMBERS), (8, None, MEMBERS[:1])],
    ids=["members_per_forward", "memory", "one member"],
)
def test_a_population_of_one_that_was_asked_for_is_said_once(most, room, members, caplog, monkeypatch):
    model = tiny_lstm().eval()
    if room is not None:
        monkeypatch.setattr("zoo_hf.probes.room", lambda model: room)
    with caplog.at_level(logging.WARNING, logger="zoo_hf"), torch.inference_mode():
        probes, losses = of_probes("population", model, loss_of(model), members, members_per_forward=most)
        how = {"model": model, "distribution": "rademacher"}
        again = probes.losses(loss_of(model), trained(model), members, RADIUS, **how)
        expected = probe(loss_of(model), trained(model), members, RADIUS)
    (record,) = caplog.records
    assert "one is all that fits" in record.message
    assert f"`members_per_forward` is {most}" in record.message
    assert "use probes='serial'" in record.message
    assert torch.equal(losses, expected)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("choice", ["serial", "population"])
@pytest.mark.parametrize(("low_rank", "full"), [("low_rank", "rademacher"), ("low_rank_gaussian", "gaussian")])
def test_where_no_matrix_is_trained_low_rank_directions_are_full_ones(low_rank, full, choice):
    model = tiny_llama().eval()
    norms, found = {name: p for name, p in trained(model).items() if "norm" in name}, []
    for kind in (kind_of(low_rank, model, 2), full):
        with torch.inference_mode():
            how = {"model": model, "distribution": kind}
            found.append(Probes(choice).losses(loss_of(model), norms, MEMBERS, RADIUS, **how))
    assert torch.equal(*found)


@pytest.mark.parametrize("probes", ["auto", "population"])
def test_the_choice_is_kept_by_a_checkpoint_and_taken_up_when_resumed(trainer, tmp_path, probes):
    arguments = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "probes": probes, "num_directions": 8}
    whole = trainer(tiny_llama(), texts(16), **arguments)
    whole.train()
    key = whole.probes.key(batch(texts(4)))
    assert whole.probes.chosen == {key: 16}
    path = tmp_path / "checkpoint-2" / "optimizer.pt"
    saved = torch.load(path)
    assert saved["zoo"]["population"] == {key: 16}
    saved["zoo"]["population"] = {key: 3}  # as where memory did not suffice
    torch.save(saved, path)
    resumed = trainer(tiny_llama(), texts(16), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.probes.chosen == {key: 3}


def test_what_a_checkpoint_chose_under_other_arguments_is_no_choice():
    batches = {"input_ids": torch.zeros(4, 8)}
    keys = {Probes(*asked).key(batches) for asked in (("auto",), ("auto", 8), ("population",), ("population", 8))}
    assert len(keys) == 4
    assert Probes("population", None, {EVERY: 1}).key(batches) in keys, "only `auto` keeps to one at a time"


@pytest.mark.parametrize("whence", ["checkpoint", "trajectory"])
def test_a_run_that_fell_back_to_one_at_a_time_keeps_to_it_when_resumed(trainer, tmp_path, whence, caplog):
    arguments = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "probes": "auto", "num_directions": 8}
    if whence == "trajectory":
        arguments["save_strategy"] = "no"
    trainer(Stateful(), classes(8), **arguments).train()
    caplog.clear()
    longer = trainer(Stateful(), classes(32, 16), **(arguments | {"max_steps": 3}))  # batches of another shape
    with caplog.at_level(logging.WARNING, logger="zoo_hf.probes"):
        longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 3
    assert longer.probes.chosen[EVERY] == max(longer.probes.chosen.values()) == 1
    assert [record for record in caplog.records if record.name == "zoo_hf.probes"] == []


@pytest.mark.parametrize(
    ("make", "count", "chosen"),
    [
        (tiny_llama, 16, {KEY: 16}),
        (lambda: SMALL["rwkv7"](), 16, {KEY: 16}),
        (lambda: SMALL["slstm, two heads, learned state"](), 16, {KEY: 16}),
        (tiny_llama, FEW - 1, {KEY: 1}),
        (tiny_llama, 1, {}),
        (lambda: tiny_lstm(embedding_size=256, hidden_size=512), 16, {KEY: 1}),
    ],
    ids=["llama", "rwkv7", "slstm", "few members", "one member", "a large LSTM"],
)
def test_auto_takes_a_population_where_overhead_outweighs_arithmetic(make, count, chosen):
    model = make().eval()
    with torch.inference_mode():
        probes, _ = of_probes("auto", model, loss_of(model), MANY[:count])
    assert probes.chosen == chosen


def test_a_population_is_no_larger_than_what_may_be_added_to_memory(monkeypatch):
    model = tiny_llama().eval()
    for room, most in ((10**9, 16), (200_000, 4), (0, 1)):
        monkeypatch.setattr("zoo_hf.prediction.ADDED_BYTES", room)
        with torch.inference_mode():
            probes, _ = of_probes("auto", model, loss_of(model), MANY[:16])
        assert probes.chosen[KEY] <= most


def test_a_larger_batch_gets_a_population_of_its_own(trainer, monkeypatch):
    monkeypatch.setattr("zoo_hf.prediction.ADDED_BYTES", 1_000_000)
    model = tiny_llama()
    run = trainer(model, texts(4), probes="auto", num_directions=8)
    for rows in (1, 32):
        inputs = batch(texts(rows, 16))
        run.training_step(model, inputs, torch.tensor(15 * rows))
        run.optimizer.step()
    few, many = run.probes.chosen.values()
    assert few == 16 > many


def test_batches_of_all_lengths_up_to_the_next_power_of_two_share_one_choice():
    model, calls = tiny_llama().eval(), []
    probes = Probes("auto")
    for length in (40, 33, 64, 63, 50, 48):
        ids = torch.randint(1, 11, (2, length))
        inputs = {"input_ids": ids, "labels": ids}

        def objective(inputs=inputs):
            calls.append(inputs["input_ids"].shape[1])
            return loss_of(model, inputs)()

        with torch.inference_mode():
            how = {"model": model, "distribution": "rademacher", "batch": inputs}
            probes.losses(objective, trained(model), MANY[:16], RADIUS, **how)
    assert probes.chosen == {probes.key({"labels": torch.empty(2, 64), "input_ids": torch.empty(2, 64)}): 16}
    assert calls == [40, 40, 40, 33, 64, 63, 50, 48], "once alone and once by two, then each as one population"


def test_batches_of_as_many_numbers_but_another_shape_do_not_share_a_choice():
    shapes = [(64, 8), (1, 512), (8, 64), (512,)]
    keys = [Probes("auto").key({"input_ids": torch.empty(shape)}) for shape in shapes]
    assert len({*keys, Probes("auto").key({"labels": torch.empty(64, 8)})}) == 5
    assert keys[0] == 4_019_731_310, "saved in checkpoints and trajectories"
    assert all(0 <= key < 2**32 for key in keys)


@pytest.mark.parametrize("first", [33, 48, 64])
def test_what_was_measured_on_a_shorter_batch_holds_for_the_longest_of_its_key(first, monkeypatch):
    room = 3_000_000
    monkeypatch.setattr("zoo_hf.prediction.ADDED_BYTES", room)
    model = tiny_llama().eval()
    short, long = (
        {"input_ids": ids, "labels": ids} for ids in (torch.ones(2, first).long(), torch.ones(2, 64).long())
    )
    with torch.inference_mode():
        probes, _ = of_probes("population", model, loss_of(model, short), batch=short)
        members = probes.chosen[probes.key(long)]
        held = member_weights(trained(model), MANY[:members], RADIUS, "rademacher")
        alone = work(loss_of(model, long)).peak
        peak = work(lambda: evaluate(loss_of(model, long), model, held)).peak
    assert 1 < members < len(MANY)
    assert peak + 1.5 * sum(value.nbytes for (value,) in held.own.values()) <= room + alone


def test_ranks_choose_by_the_same_number_of_members():
    model = tiny_llama().eval()
    choices = []
    for share in (MANY[:13], MANY[:12]):  # of 25 members on two ranks
        probes = Probes("auto")
        with torch.inference_mode():
            how = {"model": model, "distribution": "rademacher", "total": 25 // 2}
            probes.losses(loss_of(model), trained(model), share, RADIUS, **how)
        choices.append(probes.chosen)
    assert choices == 2 * [{KEY: 12}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", [CentralDifference, ForwardDifference])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_a_population_stays_within_its_memory_whatever_its_dtype_and_noise(
    dtype, estimator, distribution, monkeypatch
):
    room, philox = 12_000_000, 4 << 20  # which is taken while any noise is made
    monkeypatch.setattr("zoo_hf.prediction.ADDED_BYTES", room)
    model = tiny_llama().eval().to(dtype)
    members = estimator(RADIUS, distribution).members([Direction(1, 2, index) for index in range(900)])
    with torch.inference_mode():
        alone = work(loss_of(model)).peak
        probes = Probes("population")
        how = {"model": model, "distribution": distribution}
        peak = work(lambda: probes.losses(loss_of(model), trained(model), members, RADIUS, **how).sum()).peak
    (chosen,) = probes.chosen.values()
    assert 1 < chosen < len(members)
    assert 0.4 * room < peak <= room + alone + philox


def test_autocast_leaves_doubles_as_they_are():
    model = tiny_llama().eval().double()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        for kind in ("rademacher", kind_of("low_rank", model, 1)):
            how = {"model": model, "members_per_forward": 8, "distribution": kind}
            found = probe_population(loss_of(model), trained(model), MEMBERS, RADIUS, **how)
            expected = probe(loss_of(model), trained(model), MEMBERS, RADIUS, distribution=kind)
            assert (found - expected).abs().max() < 1e-6


def classes(count, length=8):
    return [{"input_ids": row["input_ids"] % 11, "labels": row["labels"] % 11} for row in texts(count, length)]


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
    run = trainer(Stateful(), classes(8), probes="auto", num_directions=8)
    with caplog.at_level(logging.WARNING, logger="zoo_hf"):
        run.train()
    (record,) = (record for record in caplog.records if record.name == "zoo_hf.probes")
    assert "a forward pass sets last, seen in the model" in record.message
    assert run.model.seen.shape == run.model.last.shape == ()
    assert float(run.model.seen) != 0


class Counting(nn.Module):
    """A model that writes into a tensor of its own."""

    def __init__(self, parameter):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.frozen = nn.Linear(3, 1), nn.Parameter(torch.zeros(()), requires_grad=False)
        self.inner.register_buffer("count", torch.zeros(()))
        self.parameter = parameter

    def forward(self):
        (self.frozen if self.parameter else self.inner.count).add_(1)
        return self.inner(torch.ones(3)).square().sum()


@pytest.mark.parametrize(("parameter", "named"), [(False, "inner.count"), (True, "frozen")])
def test_a_model_that_writes_into_its_own_tensors_is_noticed(parameter, named):
    model = Counting(parameter)
    with (
        pytest.raises(RuntimeError, match=f"a forward pass sets {named} in the model"),
        torch.inference_mode(),
    ):
        probe_population(model, trained(model), MEMBERS, RADIUS, model=model, members_per_forward=8)


class Recording(ZOOTrainer):
    """Its own `compute_loss` keeps the losses that it sees."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.kept_losses = [*vars(self).get("kept_losses", []), loss.detach()]
        return loss


@pytest.mark.parametrize("how", ["compute_loss", "compute_loss_func", "hook", "later hook"])
def test_those_who_see_every_probe_see_one_member_at_a_time_unless_asked(config, how):
    seen, steps = [], 2

    def keep(outputs, labels, num_items_in_batch=None):
        seen.append(F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
        return seen[-1]

    given = {"compute_loss_func": keep} if how == "compute_loss_func" else {}
    kind = Recording if how == "compute_loss" else ZOOTrainer
    run = kind(tiny_llama(), config(probes="auto", num_directions=8), train_dataset=texts(8), **given)
    if how == "later hook":
        run.training_step(run.model, batch(texts(4)), torch.tensor(28))
        run.optimizer.step()
        assert set(run.probes.chosen.values()) == {16}
    if "hook" in how:
        run.model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    if how == "later hook":
        run.training_step(run.model, batch(texts(4)), torch.tensor(28))
        steps = 1
    else:
        run.train()
    losses = run.kept_losses if how == "compute_loss" else seen
    assert len(losses) == steps * 16, "sixteen members a step"
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
