"""Whole models whose members are evaluated by Triton's kernels, against the plain way."""

import pytest
import torch
from conftest import texts, tiny_lstm, weights
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from zoo_hf import CentralDifference, Direction, RNNConfig, RNNForCausalLM, replay
from zoo_hf.kernels.choice import VARIABLE
from zoo_hf.low_rank import kind_of
from zoo_hf.named import NamedMatrix
from zoo_hf.perturbation import probe
from zoo_hf.population import forms_of_names, member_weights, probe_population
from zoo_hf.probes import Probes

from .conftest import DEVICE, HALVES, needs_triton


pytestmark = needs_triton


RADIUS = 2.0**-6
MEMBERS = CentralDifference(RADIUS).members([Direction(0, 3, i) for i in range(2)])
# heads, and whether logits are made: by their own kernels, whatever the cell
CELLS = [("lstm", 2, True), ("gru", 1, False), ("slstm", 2, True), ("elman", 1, False)]


def recurrent(cell_type="lstm", num_heads=2, **config):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "embedding_size": 12, "hidden_size": 20}
    return RNNForCausalLM(RNNConfig(cell_type=cell_type, num_heads=num_heads, **sizes, **config)).to(DEVICE).eval()


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).to(DEVICE).eval()


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model, **arguments):
    ids = torch.randint(40, (2, 4), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return lambda: model(input_ids=ids, labels=ids, use_cache=False, **arguments).loss


def losses_of(model, distribution="rademacher", members_per_forward=3, **arguments):
    """Serial and population losses of `MEMBERS`."""
    kind, objective, parameters = kind_of(distribution, model, 2), loss_of(model, **arguments), trained(model)
    with torch.inference_mode():
        serial = probe(objective, parameters, MEMBERS, RADIUS, distribution=kind)
        way = {"model": model, "members_per_forward": members_per_forward, "distribution": kind}
        return serial, probe_population(objective, parameters, MEMBERS, RADIUS, **way)


def near(found, expected, rtol=1e-3):
    """Losses apart by a thousandth of what members differ by."""
    torch.testing.assert_close(found, expected, rtol=0, atol=rtol * expected.std().item())
    assert expected.std() > 1e-4


@pytest.mark.parametrize(("cell_type", "num_heads", "skip_logits"), CELLS)
def test_members_of_a_recurrent_model_have_the_losses_of_the_plain_way(both, cell_type, num_heads, skip_logits):
    model = recurrent(cell_type, num_heads)
    (serial, population), (expected, _) = both(losses_of, model, skip_logits=skip_logits)
    near(serial, expected)
    near(population, expected)


@pytest.mark.parametrize("distribution", ["gaussian", "low_rank", "low_rank_gaussian"])
def test_other_directions_have_the_losses_of_the_plain_way(both, distribution):
    model = recurrent()
    (serial, population), (expected, _) = both(losses_of, model, distribution, skip_logits=True)
    near(serial, expected)
    near(population, expected)


@pytest.mark.parametrize("adapter", [False, True])
def test_members_of_a_transformer_have_the_losses_of_the_plain_way(both, adapter):
    model = llama()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        model = model.to(DEVICE).eval()
    (serial, population), (expected, _) = both(losses_of, model)
    near(serial, expected)
    near(population, expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_as_near_to_float32_as_the_plain_way_is(run_by, both, dtype):
    exact, _ = run_by("plain", losses_of, recurrent("gru", 1), skip_logits=True)
    (serial, population), (plain, _) = both(losses_of, recurrent("gru", 1).to(dtype), skip_logits=True)
    error = (plain - exact).std()
    for found in (serial, population):
        assert (found - exact).std() < max(2 * error, 0.1 * exact.std())


def test_under_autocast_a_population_has_its_serial_losses(both):
    model = recurrent("gru", 1)

    def run():
        with torch.autocast(DEVICE, torch.bfloat16):
            return losses_of(model, skip_logits=True)

    (_, population), (plain, _) = both(run)
    near(population, plain, rtol=0.2)


def test_matrices_enter_by_name_and_nothing_of_members_times_their_size_is_made(monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")
    model = recurrent()
    parameters = trained(model)
    forms = forms_of_names(model, parameters, MEMBERS, RADIUS, "rademacher")
    assert set(forms) == {name for name, p in parameters.items() if p.dim() > 1}
    held = member_weights(parameters, MEMBERS, RADIUS, "rademacher", forms)
    for name in forms:
        assert isinstance(held.stand_ins[name](*(part[0] for part in held.own[name])), NamedMatrix)
        assert sum(part.numel() for part in held.own[name]) == 2 * len(MEMBERS)


def test_a_power_of_two_that_weights_feel_is_multiplied_once(monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")
    model = recurrent().to(torch.float16)
    for radius, form in ((2.0**-6, "fused"), (0.01, "apart"), (2.0**-20, "apart")):
        forms = forms_of_names(model, trained(model), MEMBERS, radius, "rademacher")
        assert set(forms.values()) == {form}


def test_members_of_several_steps_are_stacked(both):
    model = recurrent()
    members = CentralDifference(RADIUS).members([Direction(0, 3, 0), Direction(0, 4, 0)])

    def run():
        way = {"model": model, "members_per_forward": 4}
        with torch.inference_mode():
            return probe_population(loss_of(model), trained(model), members, RADIUS, **way)

    near(*both(run))


@pytest.mark.parametrize("choice", ["auto", "population"])
def test_what_a_population_takes_is_counted(monkeypatch, choice):
    monkeypatch.setenv(VARIABLE, "triton")
    model, probes = recurrent("elman", 1), Probes(choice)
    members = CentralDifference(RADIUS).members([Direction(0, 3, i) for i in range(8)])
    with torch.inference_mode():
        found = probes.losses(
            loss_of(model), trained(model), members, RADIUS, model=model, distribution="rademacher", batch={}
        )
    assert list(probes.chosen.values()) == [16]
    assert len(found) == 16


def test_a_run_by_these_kernels_is_replayed_by_the_plain_ones(monkeypatch, trainer, tmp_path):
    monkeypatch.setenv(VARIABLE, "triton")
    model = tiny_lstm()
    trainer(model, texts(8, 4), max_steps=2, num_directions=2, probes="population", use_cpu=DEVICE == "cpu").train()
    monkeypatch.setenv(VARIABLE, "plain")
    again = tiny_lstm()
    replay(again, tmp_path / "trajectory.zoo")
    start = weights(tiny_lstm())
    for name, weight in weights(again).items():
        found = model.get_parameter(name).detach().cpu()
        torch.testing.assert_close(found, weight, rtol=1e-6, atol=1e-7)
        assert not torch.equal(found, start[name])


def test_an_unknown_backend_or_one_that_cannot_run_is_named(monkeypatch):
    weight = torch.ones(3)
    monkeypatch.setenv(VARIABLE, "trtion")
    with pytest.raises(ValueError, match=r"ZOO_HF_KERNELS must be one of .*'triton'.*, got 'trtion'"):
        torch.ops.zoo_hf.displace_(weight, weight, [0, 0, 0], "w", 0, 1.0, "rademacher")
    monkeypatch.setenv(VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="ZOO_HF_KERNELS=triton cannot run on cpu: move the model to a GPU"):
        torch.ops.zoo_hf.displace_(weight, weight, [0, 0, 0], "w", 0, 1.0, "rademacher")


def test_a_hook_on_the_head_is_heeded(monkeypatch):
    model = recurrent()
    model.lm_head.register_forward_hook(lambda module, inputs, logits: 2 * logits)
    with torch.inference_mode():
        expected = loss_of(model)()
        monkeypatch.setenv(VARIABLE, "triton")
        torch.testing.assert_close(loss_of(model, skip_logits=True)(), expected, rtol=1e-5, atol=0)
