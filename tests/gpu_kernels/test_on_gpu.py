"""What only a GPU can show: its memory, CUDA graphs, and a run that gives a CPU's weights."""

import pytest
import torch
from conftest import texts, tiny_lstm, weights

from zoo_hf import CentralDifference, Direction, RNNConfig, RNNForCausalLM, Update, replay
from zoo_hf.perturbation import probe
from zoo_hf.population import probe_population


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

RADIUS = 2.0**-6
MEMBERS = CentralDifference(RADIUS).members([Direction(0, 1, i) for i in range(2)])


def many_heads(heads: int, size: int, dtype: torch.dtype) -> RNNForCausalLM:
    torch.manual_seed(0)
    sizes = {"embedding_size": 64, "hidden_size": heads * size, "num_heads": heads}
    return RNNForCausalLM(RNNConfig(initialization="paper", **sizes)).to("cuda", dtype).eval()


def loss_of(model, rows: int, tokens: int):
    ids = torch.randint(256, (rows, tokens), generator=torch.Generator().manual_seed(1)).to("cuda")
    return lambda: model(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "size", "tokens"), [(8, 64, 20), (3, 50, 20), (4, 200, 20), (4, 200, 150)])
def test_members_have_the_losses_of_the_plain_way(monkeypatch, dtype, heads, size, tokens):
    model = many_heads(heads, size, dtype)
    objective, parameters = loss_of(model, 5, tokens), dict(model.named_parameters())
    with torch.inference_mode():
        monkeypatch.setenv("ZOO_HF_KERNELS", "plain")
        expected = probe(objective, parameters, MEMBERS, RADIUS)
        monkeypatch.delenv("ZOO_HF_KERNELS")
        serial = probe(objective, parameters, MEMBERS, RADIUS)
        population = probe_population(objective, parameters, MEMBERS, RADIUS, model=model, members_per_forward=3)
    spread = expected.std().item()
    for found in (serial, population):
        torch.testing.assert_close(found, expected, rtol=0, atol=spread * (1e-3 if dtype == torch.float32 else 0.2))


def test_training_in_bfloat16_takes_two_bytes_a_weight_and_one_displaced_copy():
    model = many_heads(8, 512, torch.bfloat16)
    parameters = dict(model.named_parameters())
    held = sum(p.nbytes for p in parameters.values())
    objective, estimator = loss_of(model, 1, 4), CentralDifference(RADIUS)
    update = Update(torch.optim.SGD(parameters.values(), lr=1e-3), {p: name for name, p in parameters.items()})

    def step() -> None:
        with torch.inference_mode():
            losses = probe(objective, parameters, MEMBERS, RADIUS)
        update.hold(estimator.estimate([Direction(0, 1, i) for i in range(2)], losses))
        update.step()

    peaks = []
    for run in (torch.inference_mode()(objective), step):
        run()  # compiles
        torch.cuda.reset_peak_memory_stats()
        run()
        peaks.append(torch.cuda.max_memory_allocated())
    inference, training = peaks
    assert training - inference < 1.05 * held


def test_a_run_on_a_gpu_is_replayed_on_a_cpu(trainer, tmp_path):
    model = tiny_lstm()
    start = weights(model)
    trainer(model, texts(8), use_cpu=False, probes="population").train()
    again = tiny_lstm()
    replay(again, tmp_path / "trajectory.zoo")
    for name, weight in weights(again).items():
        torch.testing.assert_close(model.get_parameter(name).detach().cpu(), weight, rtol=1e-6, atol=1e-7)
        assert not torch.equal(weight, start[name])
