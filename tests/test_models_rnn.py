"""The cells of `zoo_rnn` against torch's own and against their formulas, its sizes, and its initial weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_models import rnn
from torch import nn

from zoo_hf.models import RNNConfig, RNNForCausalLM, configuration_rnn, initialization_rnn
from zoo_hf.models.configuration_rnn import CELL_TYPES, PRESETS
from zoo_hf.models.elman import Elman, elman, elman_fused, elman_scan
from zoo_hf.models.gru import GRU, GRUWeights, gru, gru_fused, gru_scan
from zoo_hf.models.lstm import LSTM, TOKENS_FOR_KERNELS, TOKENS_TO_PACK, lstm, lstm_fused, lstm_scan
from zoo_hf.models.modeling_rnn import CELLS
from zoo_hf.models.recurrent_layer import LayerWeights
from zoo_hf.models.recurrent_product import packing_pays
from zoo_hf.models.slstm import SLSTM, slstm_scan


TWINS = {"lstm": nn.LSTM, "gru": nn.GRU, "elman": nn.RNN}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}

every_cell = pytest.mark.parametrize("cell_type", CELL_TYPES)
every_twin = pytest.mark.parametrize("cell_type", TWINS)
one_and_two_heads = pytest.mark.parametrize("num_heads", [1, 2])
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


@pytest.fixture(autouse=True)
def seeded():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(cell_type="lstm", **config):
    return rnn(cell_type=cell_type, **config).eval()


def tokens(*shape):
    return torch.randint(11, shape)


def same(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def torch_twin(layers):
    """nn.LSTM, nn.GRU or nn.RNN with the weights of our layers; several heads become one block-diagonal matrix."""
    first = layers[0]
    gates, heads, size, _ = first.recurrent_weight.shape
    cell_type = next(name for name, cell in CELLS.items() if isinstance(first, cell))
    twin = TWINS[cell_type](first.input_weight.shape[1], heads * size, len(layers), batch_first=True)
    twin = twin.to(first.bias.dtype)
    with torch.no_grad():
        for index, layer in enumerate(layers):
            dense = torch.cat([torch.block_diag(*layer.recurrent_weight[gate]) for gate in range(gates)])
            recurrent_bias = torch.zeros_like(layer.bias)
            if cell_type == "gru":
                recurrent_bias[-heads * size :] = layer.candidate_bias
            weights = (layer.input_weight, dense, layer.bias, recurrent_bias)
            for ours, theirs in zip(weights, twin.all_weights[index], strict=True):
                theirs.copy_(ours)
    return twin


def twin_state(final):
    """The state (B, L, S, H) from what torch's modules return."""
    return torch.stack(final if isinstance(final, tuple) else (final,), dim=2).transpose(0, 1)


@every_twin
@both_dtypes
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_outputs_and_state_equal_torch(cell_type, dtype, num_layers, num_heads):
    model = small(cell_type, num_layers=num_layers, num_heads=num_heads).to(dtype).model
    ids = tokens(3, 7)
    expected, final = torch_twin(model.layers)(model.embed_tokens(ids))
    outputs = model(ids)
    same(outputs.last_hidden_state, expected, TOLERANCE[dtype])
    same(outputs.state, twin_state(final), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("cell", "pack", "fused", "scan", "num_heads"),
    [
        (LSTM, LayerWeights, lstm_fused, lstm_scan, 1),
        (LSTM, LayerWeights, lstm_fused, lstm_scan, 4),
        (GRU, GRUWeights, gru_fused, gru_scan, 1),
        (Elman, LayerWeights, elman_fused, elman_scan, 1),
    ],
)
@both_dtypes
@pytest.mark.parametrize("padded", [False, True])
def test_fused_kernel_equals_plain_scan_and_so_do_its_gradients(cell, pack, fused, scan, num_heads, dtype, padded):
    layer = cell(5, 8, num_heads).to(dtype)
    inputs, state = torch.randn(4, 20, 5, dtype=dtype), torch.randn(4, cell.slots, 8, dtype=dtype)
    real = None
    if padded:
        real = torch.rand(4, 20) < 0.5
        real[0] = False
    gradients = []
    for run in (fused, scan):
        outputs, final = run(inputs, state, pack(*layer.parameters()), real)
        gradients.append(torch.autograd.grad((outputs.sin().sum() + final.cos().sum()), list(layer.parameters())))
    same(outputs, fused(inputs, state, pack(*layer.parameters()), real)[0], TOLERANCE[dtype])
    same(final, fused(inputs, state, pack(*layer.parameters()), real)[1], TOLERANCE[dtype])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=50 * TOLERANCE[dtype], rtol=1e-5)


@pytest.mark.parametrize(
    ("heads", "rows", "length", "path"),
    [
        (4, 2, TOKENS_FOR_KERNELS // 2, "fused"),
        (4, 2, 1, "scan"),
        (1, 2, TOKENS_TO_PACK, "fused"),
        (1, 300, 1, "scan"),
    ],
)
def test_torchs_kernel_is_taken_only_where_it_pays(monkeypatch, heads, rows, length, path):
    weights = LayerWeights(*LSTM(5, 8, heads).parameters())
    monkeypatch.setattr("zoo_hf.models.lstm.lstm_fused", lambda *arguments: "fused")
    monkeypatch.setattr("zoo_hf.models.lstm.lstm_scan", lambda *arguments: "scan")
    assert lstm(torch.randn(rows, length, 5), torch.zeros(rows, 2, 8), weights) == path


@pytest.mark.parametrize(
    ("cell", "pack", "run", "size"),
    [(GRU, GRUWeights, gru, 420), (Elman, LayerWeights, elman, 728), (SLSTM, LayerWeights, slstm_scan, 364)],
)
@pytest.mark.parametrize("padded", [False, True])
def test_a_packed_recurrent_matrix_gives_what_a_plain_one_does(cell, pack, run, size, padded):
    weights = pack(*cell(5, size).parameters())
    inputs, state = torch.randn(4, 20, 5), torch.rand(4, cell.slots, size)
    real = torch.rand(4, 20) < 0.5 if padded else None
    assert not packing_pays(inputs, weights.recurrent), "packed matrices have no gradient"
    expected = run(inputs, state, weights, real)
    with torch.no_grad():
        assert packing_pays(inputs, weights.recurrent)
        found = run(inputs, state, weights, real)
    for ours, theirs in zip(found, expected, strict=True):
        same(ours, theirs, 5e-6)


@every_cell
def test_one_head_shares_memory_with_torchs_recurrent_matrix(cell_type):
    weight = small(cell_type).model.layers[0].recurrent_weight
    gates = CELLS[cell_type].gates
    assert weight.shape == (gates, 1, 8, 8)
    assert weight.view(gates * 8, 8).data_ptr() == weight.data_ptr()


def slstm_formula(inputs, weights):
    """h as its definition has it, with exponentials that may overflow, c and n from zero."""
    dense = torch.cat([torch.block_diag(*gate) for gate in weights.recurrent])
    h = c = n = inputs.new_zeros(len(inputs), len(weights.bias) // 4)
    outputs = []
    for x in inputs.unbind(1):
        i, f, z, o = (x @ weights.input.mT + h @ dense.mT + weights.bias).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.exp() * z.tanh()
        n = f.sigmoid() * n + i.exp()
        h = o.sigmoid() * c / n
        outputs.append(h)
    return torch.stack(outputs, dim=1)


@both_dtypes
@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_slstm_equals_its_formula(dtype, num_heads):
    weights = LayerWeights(*SLSTM(5, 8, num_heads).to(dtype).parameters())
    inputs = 3 * torch.randn(3, 20, 5, dtype=dtype)
    outputs, state = slstm_scan(inputs, torch.zeros(3, 4, 8, dtype=dtype), weights)
    same(outputs, slstm_formula(inputs, weights), TOLERANCE[dtype])
    assert state[:, 2].min() >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("input_gate", [-300.0, 300.0])
def test_slstm_starts_from_zeros_whatever_the_size_of_its_exponentials(dtype, input_gate):
    """After one token h = o·tanh(z): the input gate's exponential, 0 or inf by itself, cancels."""
    weights = LayerWeights(*SLSTM(5, 8).to(dtype).parameters())
    with torch.no_grad():
        weights.bias[:8] = input_gate
    inputs = torch.randn(3, 4, 5, dtype=dtype)
    outputs, state = slstm_scan(inputs, torch.zeros(3, 4, 8, dtype=dtype), weights)
    _, _, z, o = F.linear(inputs[:, 0], weights.input, weights.bias).chunk(4, dim=-1)
    torch.testing.assert_close(outputs[:, 0], o.sigmoid() * z.tanh(), atol=2 * torch.finfo(dtype).eps, rtol=0)
    assert outputs.isfinite().all()
    assert state.isfinite().all()
    assert state.dtype == torch.float32
    gradients = torch.autograd.grad(outputs.double().square().sum(), list(weights))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_slstm_counts_beyond_256_in_bfloat16():
    """With shut exponentials and an open forget gate n is the number of tokens, which bfloat16 cannot hold."""
    weights = LayerWeights(*(torch.zeros_like(p) for p in SLSTM(5, 8).to(torch.bfloat16).parameters()))
    weights.bias[8:16] = 100  # f = 1
    state = torch.zeros(1, 4, 8, dtype=torch.bfloat16)
    for _ in range(3):
        _, state = slstm_scan(torch.ones(1, 200, 5, dtype=torch.bfloat16), state, weights)
    assert torch.equal(state[0, 2], torch.full((8,), 600.0))


@every_twin
def test_masked_positions_repeat_the_last_real_output(cell_type):
    model, ids = small(cell_type), tokens(2, 6)
    real = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]])
    outputs = model.model(ids, attention_mask=real).last_hidden_state
    assert torch.equal(outputs[0, 3:], outputs[0, 2].expand(3, 8))
    assert torch.equal(outputs[1, :2], torch.zeros(2, 8))


@every_twin
@one_and_two_heads
def test_gradient_equals_autograd_through_torch(cell_type, num_heads):
    model, ids = small(cell_type, num_heads=num_heads).double(), tokens(3, 7)
    model(ids, labels=ids).loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    twin = torch_twin(model.model.layers)
    model.zero_grad()
    logits = model.lm_head(twin(model.model.embed_tokens(ids))[0])
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        same(ours[name], model.get_parameter(name).grad, 1e-12)
    for index, (input_weight, recurrent_weight, bias, recurrent_bias) in enumerate(twin.all_weights):
        prefix = f"model.layers.{index}."
        same(ours[prefix + "input_weight"], input_weight.grad, 1e-12)
        same(ours[prefix + "bias"], bias.grad, 1e-12)
        blocks = ours[prefix + "recurrent_weight"]
        for gate, dense in enumerate(recurrent_weight.grad.split(8)):
            mask = torch.block_diag(*torch.ones_like(blocks[gate])).bool()
            same(torch.block_diag(*blocks[gate])[mask], dense[mask], 1e-12)
        if cell_type == "gru":
            same(ours[prefix + "candidate_bias"], recurrent_bias.grad[-8:], 1e-12)


@every_cell
@one_and_two_heads
def test_learned_initial_state_is_the_state_that_may_also_be_given(cell_type, num_heads):
    model, ids = small(cell_type, num_heads=num_heads, learn_initial_state=True), tokens(3, 6)
    plain = small(cell_type, num_heads=num_heads)
    plain.load_state_dict({name: p for name, p in model.state_dict().items() if "learned" not in name})
    learned = model.model.learned_state
    assert learned.shape == (2, 2 if cell_type in ("lstm", "slstm") else 1, 8)
    assert torch.equal(learned, torch.zeros_like(learned))
    nn.init.normal_(learned)
    state = learned.expand(3, *learned.shape)
    if cell_type == "slstm":
        counted = torch.ones(3, 2, 1, 8)  # as if one token had been seen
        state = torch.cat([state, counted, torch.zeros_like(counted)], dim=2)
    assert torch.equal(model(ids).logits, plain(ids, state=state).logits)
    assert (model(ids).logits - plain(ids).logits).abs().max() > 0.01
    model(ids, labels=ids).loss.backward()
    assert learned.grad.abs().min() > 0


def test_a_seed_gives_the_default_model_the_weights_that_published_runs_started_from():
    last = {
        "model.embed_tokens.weight": -0.26690656,
        "model.layers.0.input_weight": -0.07078013,
        "model.layers.0.recurrent_weight": -0.01071944,
        "model.layers.0.bias": 0.12658775,
        "lm_head.weight": -0.03237257,
        "lm_head.bias": -0.15536946,
    }
    weights = RNNForCausalLM(RNNConfig()).state_dict()
    assert list(weights) == list(last)
    assert {name: weight.flatten()[-1].item() for name, weight in weights.items()} == pytest.approx(last, abs=1e-7)


def test_choices_by_name_are_all_there():
    assert tuple(CELLS) == CELL_TYPES
    assert tuple(initialization_rnn.INITIALIZATIONS) == configuration_rnn.INITIALIZATIONS


SIZES = {
    "100k": 150_740,
    "1M": 1_139_700,
    "10M": 10_627_700,
    "100M": 112_606_100,
    "1.1B": 1_162_045_100,
    "4.5B": 4_506_010_100,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_papers_number_of_parameters(name):
    with torch.device("meta"):
        model = RNNForCausalLM(RNNConfig.preset(name))
    assert model.num_parameters() == SIZES[name]


def test_presets_take_other_fields_and_unknown_ones_are_refused():
    config = RNNConfig.preset("100k", vocab_size=256, cell_type="gru")
    assert (config.hidden_size, config.num_heads, config.vocab_size, config.cell_type) == (240, 12, 256, "gru")
    with pytest.raises(ValueError, match=r"no preset '2M'; take one of 100k, 1M, 10M, 100M, 1\.1B, 4\.5B"):
        RNNConfig.preset("2M")


@every_cell
def test_torchs_initial_weights_are_uniform_within_one_over_root_hidden_size(cell_type):
    model = small(cell_type, embedding_size=256, hidden_size=256, vocab_size=500)
    for parameter in [*model.model.layers.parameters(), *model.lm_head.parameters()]:
        assert parameter.abs().max() <= 256**-0.5
        assert parameter.std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.15)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(1, rel=0.02)
    tied = small(cell_type, embedding_size=256, hidden_size=256, vocab_size=500, tie_word_embeddings=True)
    assert tied.lm_head.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)


@every_cell
def test_the_papers_initial_weights_are_normal_with_its_deviations(cell_type):
    sizes = {"embedding_size": 100, "hidden_size": 256, "num_heads": 4, "vocab_size": 500}
    model = small(cell_type, initialization="paper", learn_initial_state=True, **sizes)
    first, second = model.model.layers
    expected = {
        first.input_weight: 100**-0.5,
        second.input_weight: 256**-0.5,
        first.recurrent_weight: 64**-0.5,
        model.lm_head.weight: 64**-0.5,
        model.model.embed_tokens.weight: 1,
    }
    for weight, deviation in expected.items():
        count = weight.numel()
        assert weight.std().item() == pytest.approx(deviation, rel=4 / math.sqrt(2 * count))
        assert abs(weight.mean().item()) < 4 * deviation / math.sqrt(count)
        assert weight.abs().max() > 3.5 * deviation  # not uniform
    zero = [model.model.learned_state, model.lm_head.bias, first.bias, second.bias]
    zero += [first.candidate_bias] if cell_type == "gru" else []
    assert all(torch.equal(parameter, torch.zeros_like(parameter)) for parameter in zero)


@every_cell
@pytest.mark.parametrize("initialization", configuration_rnn.INITIALIZATIONS)
@pytest.mark.parametrize("intermediate_size", [0, 128])
def test_deep_residual_stacks_have_outputs_and_gradients_of_order_one(cell_type, initialization, intermediate_size):
    sizes = {"embedding_size": 64, "hidden_size": 64, "num_layers": 12}
    config = {"initialization": initialization, "intermediate_size": intermediate_size, "residual": True}
    model, ids = small(cell_type, **sizes, **config), tokens(4, 32)
    outputs = model(ids, labels=ids, output_hidden_states=True)
    *hidden_states, last = outputs.hidden_states
    assert last.square().mean().item() == pytest.approx(1, rel=1e-3)
    assert all(0.5 < hidden.std() < 6 for hidden in hidden_states)
    outputs.loss.backward()
    norms = [layer.layer.input_weight.grad.norm() for layer in model.model.layers]
    assert max(norms) < 20 * min(norms)


def test_residual_layers_add_what_their_formula_says():
    model = small("gru", embedding_size=8, residual=True, intermediate_size=12, num_layers=1).model
    (block,) = model.layers
    x = model.embed_tokens(tokens(2, 5))
    normal = F.rms_norm(x, (8,), eps=1e-6)
    state = torch.randn(2, 1, 8)
    y = x + gru_scan(normal, state, GRUWeights(*block.layer.parameters()))[0]
    _, network = block.feed_forward
    y = y + F.gelu(F.rms_norm(y, (8,), eps=1e-6) @ network.up.weight.mT) @ network.down.weight.mT
    same(block(x, state)[0], y, 1e-6)
    same(model(inputs_embeds=x, state=state[:, None]).last_hidden_state, F.rms_norm(y, (8,), eps=1e-6), 1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cell_type": "elmann"}, "`cell_type` must be one of lstm, gru, slstm, elman, got 'elmann'"),
        ({"initialization": "xavier"}, "`initialization` must be one of torch, paper, got 'xavier'"),
        ({"vocab_size": 0}, "`vocab_size` must be at least 1, got 0"),
        ({"embedding_size": -1}, "`embedding_size` must be at least 1, got -1"),
        ({"hidden_size": 0}, "`hidden_size` must be at least 1, got 0"),
        ({"num_layers": 0}, "`num_layers` must be at least 1, got 0"),
        ({"num_heads": 0}, "`num_heads` must be at least 1, got 0"),
        ({"chunk_length": 0}, "`chunk_length` must be at least 1, got 0"),
        ({"num_heads": 5}, "`num_heads` must divide `hidden_size`, got 5 and 32; take a divisor"),
        ({"intermediate_size": -1, "residual": True}, "`intermediate_size` must be at least 0, got -1"),
        ({"intermediate_size": 64}, "`intermediate_size` needs `residual`, got 64 without; set `residual=True`"),
        (
            {"tie_word_embeddings": True, "embedding_size": 48},
            "`embedding_size` equal to `hidden_size`, got 48 and 32; make them equal or set",
        ),
        (
            {"residual": True, "embedding_size": 48},
            "`residual` needs `embedding_size` equal to `hidden_size`, got 48 and 32; make them equal or set",
        ),
    ],
)
def test_bad_configurations_name_field_value_and_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        RNNConfig(**changes)
