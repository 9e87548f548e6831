"""The recurrent language models against torch's own cells, and against themselves by another way."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast, dynamic_module_utils
from transformers import pipeline as make_pipeline

from zoo_hf.models import RNNConfig, RNNForCausalLM, RNNModel
from zoo_hf.models.configuration_rnn import CELL_TYPES
from zoo_hf.models.gru import GRU, GRUWeights, gru_fused, gru_scan
from zoo_hf.models.lstm import LSTM, LSTMWeights, lstm_fused, lstm_scan
from zoo_hf.models.modeling_rnn import CELLS
from zoo_hf.models.recurrent import causal_lm_loss


TWINS = {"lstm": nn.LSTM, "gru": nn.GRU}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}

both_cells = pytest.mark.parametrize("cell_type", CELL_TYPES)
one_and_two_heads = pytest.mark.parametrize("num_heads", [1, 2])


@pytest.fixture(autouse=True)
def seeded():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(cell_type="lstm", **changes):
    sizes = {"vocab_size": 11, "embedding_size": 6, "hidden_size": 8, "num_layers": 2}
    return RNNForCausalLM(RNNConfig(cell_type=cell_type, **(sizes | changes))).eval()


def tokens(*shape):
    return torch.randint(11, shape)


def torch_twin(layers):
    """nn.LSTM or nn.GRU with the weights of our layers; several heads become one block-diagonal matrix."""
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
    """The state (B, L, S, H) from what nn.LSTM or nn.GRU returns."""
    return torch.stack(final if isinstance(final, tuple) else (final,), dim=2).transpose(0, 1)


@both_cells
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_outputs_and_state_equal_torch(cell_type, dtype, num_layers, num_heads):
    model = small(cell_type, num_layers=num_layers, num_heads=num_heads).to(dtype).model
    ids = tokens(3, 7)
    expected, final = torch_twin(model.layers)(model.embed_tokens(ids))
    outputs = model(ids)
    torch.testing.assert_close(outputs.last_hidden_state, expected, atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(outputs.state, twin_state(final), atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize(
    ("cell", "pack", "fused", "scan"),
    [(LSTM, LSTMWeights, lstm_fused, lstm_scan), (GRU, GRUWeights, gru_fused, gru_scan)],
)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_fused_kernel_equals_plain_scan(cell, pack, fused, scan, dtype):
    weights = pack(*cell(5, 8).to(dtype).parameters())
    inputs, state = torch.randn(3, 20, 5, dtype=dtype), torch.randn(3, cell.slots, 8, dtype=dtype)
    for ours, plain in zip(fused(inputs, state, weights), scan(inputs, state, weights), strict=True):
        torch.testing.assert_close(ours, plain, atol=TOLERANCE[dtype], rtol=0)


@both_cells
def test_one_head_shares_memory_with_torchs_recurrent_matrix(cell_type):
    weight = small(cell_type).model.layers[0].recurrent_weight
    gates = CELLS[cell_type].gates
    assert weight.shape == (gates, 1, 8, 8)
    assert weight.view(gates * 8, 8).data_ptr() == weight.data_ptr()


@both_cells
def test_initial_weights_are_uniform_within_one_over_root_hidden_size(cell_type):
    model = small(cell_type, embedding_size=256, hidden_size=256, vocab_size=500)
    for parameter in [*model.model.layers.parameters(), *model.lm_head.parameters()]:
        assert parameter.abs().max() <= 256**-0.5
        assert parameter.std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.15)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(1, rel=0.02)
    tied = small(cell_type, embedding_size=256, hidden_size=256, vocab_size=500, tie_word_embeddings=True)
    assert tied.lm_head.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)


@both_cells
@one_and_two_heads
def test_padding_changes_nothing_for_real_tokens(cell_type, num_heads):
    model = small(cell_type, num_heads=num_heads)
    ids, real = tokens(4, 9), torch.ones(4, 9, dtype=torch.long)
    real[0, :4] = 0  # left
    real[1, 6:] = 0  # right
    real[2, [0, 3, 4, 8]] = 0  # holes
    padded = model(ids, attention_mask=real)
    for row in range(4):
        alone = model(ids[row, real[row].bool()][None])
        torch.testing.assert_close(padded.logits[row, real[row].bool()], alone.logits[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(padded.state[row], alone.state[0], atol=1e-6, rtol=0)


@both_cells
@one_and_two_heads
def test_mask_of_ones_is_no_mask(cell_type, num_heads):
    model, ids = small(cell_type, num_heads=num_heads), tokens(2, 9)
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)


def test_masked_positions_repeat_the_last_real_output():
    model, ids = small(), tokens(2, 6)
    real = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]])
    outputs = model.model(ids, attention_mask=real).last_hidden_state
    assert torch.equal(outputs[0, 3:], outputs[0, 2].expand(3, 8))
    assert torch.equal(outputs[1, :2], torch.zeros(2, 8))


@both_cells
@one_and_two_heads
def test_stepwise_equals_whole_and_the_state_keeps_its_size(cell_type, num_heads):
    model, ids = small(cell_type, num_heads=num_heads), tokens(3, 12)
    whole = model(ids)
    state, logits = None, []
    for t in range(12):
        step = model(ids[:, t : t + 1], state=state)
        state = step.state
        logits.append(step.logits)
        assert state.shape == (3, 2, CELLS[cell_type].slots, 8)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(state, whole.state, atol=1e-5, rtol=0)


@both_cells
@one_and_two_heads
def test_given_state_and_global_random_numbers_are_left_alone(cell_type, num_heads):
    model, ids = small(cell_type, num_heads=num_heads), tokens(2, 5)
    state = model(ids).state
    before, generator = state.clone(), torch.get_rng_state()
    model(ids, state=state, attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]), labels=ids)
    model(ids, state=state)
    assert torch.equal(state, before)
    assert torch.equal(torch.get_rng_state(), generator)


def test_cache_and_hidden_states_come_on_request():
    model, ids = small(), tokens(2, 5)
    assert model(ids, use_cache=False).state is None
    outputs = model(ids, output_hidden_states=True)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(2, 5, 6), (2, 5, 8), (2, 5, 8)]
    assert torch.equal(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    assert torch.equal(model(ids, logits_to_keep=2).logits, model.lm_head(outputs.hidden_states[-1][:, -2:]))
    assert torch.equal(model(ids, return_dict=False)[0], outputs.logits)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeddings).logits, outputs.logits)


GENERATION = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
}


@both_cells
@pytest.mark.parametrize("how", GENERATION)
def test_generation_is_the_same_with_and_without_cache(cell_type, how):
    model, ids = small(cell_type, pad_token_id=0), tokens(6, 5)
    for parameter in model.parameters():
        parameter.data *= 4  # beams overtake each other, so that their states must move with them
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        texts.append(model.generate(ids, max_new_tokens=12, use_cache=use_cache, **GENERATION[how]))
    assert texts[0].shape == (12 if how == "beams" else 6, 17)
    assert torch.equal(texts[0], texts[1])


def test_greedy_generation_appends_the_likeliest_token_of_the_whole_context():
    model, ids = small(), tokens(1, 5)
    text = model.generate(ids, max_new_tokens=6, do_sample=False)
    for length in range(5, 11):
        assert text[0, length] == model(text[:, :length]).logits[0, -1].argmax()


def test_generation_reads_the_prompt_once_and_then_token_by_token():
    model, widths = small(), []
    model.model.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    model.generate(tokens(2, 5), max_new_tokens=4, do_sample=False)
    assert widths == [5, 1, 1, 1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("beams", [1, 3])
def test_padded_batch_generates_what_each_prompt_generates_alone(side, beams):
    model, prompts = small(num_heads=2, pad_token_id=0), [tokens(3), tokens(6), tokens(1)]
    padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side=side)
    lengths = [torch.ones(len(prompt), dtype=torch.long) for prompt in prompts]
    mask = nn.utils.rnn.pad_sequence(lengths, batch_first=True, padding_side=side)
    batch = model.generate(padded, attention_mask=mask, max_new_tokens=7, do_sample=False, num_beams=beams)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], max_new_tokens=7, do_sample=False, num_beams=beams)
        assert torch.equal(batch[row, 6:], alone[0, len(prompt) :])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_continues_from_a_given_state(use_cache, beams):
    model, ids = small(pad_token_id=0), tokens(2, 9)
    state, how = model(ids[:, :5]).state, {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    continued = model.generate(ids[:, 5:], state=state, use_cache=use_cache, **how)
    assert torch.equal(continued[:, 4:], model.generate(ids, **how)[:, 9:])


def test_text_generation_pipeline():
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "a": 1, "b": 2, "c": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")
    model = small(vocab_size=4, pad_token_id=0)
    generator = make_pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = generator("a b c", max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"]
    ids = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False)
    assert text.split() == tokenizer.decode(ids[0, 3:], skip_special_tokens=True).split()


@both_cells
@pytest.mark.parametrize("tied", [False, True])
def test_saved_model_loads_bit_for_bit(tmp_path, cell_type, tied):
    model = small(cell_type, embedding_size=8, tie_word_embeddings=tied, eos_token_id=3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is RNNForCausalLM
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_auto_classes_know_the_model():
    config = AutoConfig.for_model("zoo_rnn", cell_type="gru", num_layers=3)
    assert type(config) is RNNConfig
    assert config.num_hidden_layers == 3
    assert type(AutoModel.from_config(config)) is RNNModel
    assert type(AutoModelForCausalLM.from_config(RNNConfig())) is RNNForCausalLM


def test_saved_code_computes_the_same_without_this_package(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model, ids = small("gru"), tokens(2, 5)
    model.save_pretrained(tmp_path / "model")
    reference = json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
    copied = dynamic_module_utils.get_class_from_dynamic_module(reference, str(tmp_path / "model"))
    assert copied is not RNNForCausalLM
    assert torch.equal(copied.from_pretrained(tmp_path / "model")(ids).logits, model(ids).logits)


def test_embedding_and_head_grow_together():
    model = small(embedding_size=8, tie_word_embeddings=True)
    before = model.lm_head.weight.clone()
    model.resize_token_embeddings(13, mean_resizing=False)
    assert model(torch.tensor([[12]])).logits.shape == (1, 1, 13)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight[:11], before)


def test_loss_is_the_cross_entropy_of_shifted_labels_in_float64():
    model, ids = small().double(), tokens(3, 8)
    labels = ids.masked_fill(torch.rand(3, 8) < 0.3, -100)
    outputs = model(ids, labels=labels)
    scores, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    torch.testing.assert_close(outputs.loss, F.cross_entropy(scores, targets), atol=1e-14, rtol=0)
    summed = F.cross_entropy(scores, targets, reduction="sum")
    for count in (40, torch.tensor(40)):
        loss = model(ids, labels=labels, num_items_in_batch=count).loss
        torch.testing.assert_close(loss, summed / 40, atol=1e-14, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_stays_float64_and_resolves_below_a_float32_step(dtype):
    model, ids = small(vocab_size=200).to(dtype), torch.randint(200, (4, 50))
    outputs = model(ids, labels=ids)
    exact = causal_lm_loss(outputs.logits.double(), ids)
    assert outputs.loss.dtype == exact.dtype == torch.float64
    assert outputs.loss != outputs.loss.float()
    assert abs(outputs.loss - exact) < 5e-8  # a float32 loss near 5 moves in steps of 4.8e-7


def test_transformers_takes_the_loss_for_one_that_shifts_labels():
    assert small().loss_type == "ForCausalLM"  # otherwise the Trainer counts the first label of every row too


def test_accumulated_losses_add_up_to_the_loss_of_the_joint_batch():
    model, ids = small(), tokens(4, 6)
    labels = ids.masked_fill(torch.rand(4, 6) < 0.3, -100)
    count = (labels[:, 1:] != -100).sum()
    rows = zip(ids.split(1), labels.split(1), strict=True)
    total = sum(model(row, labels=targets, num_items_in_batch=count).loss for row, targets in rows)
    torch.testing.assert_close(total, model(ids, labels=labels).loss, atol=1e-7, rtol=0)


@both_cells
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
        torch.testing.assert_close(ours[name], model.get_parameter(name).grad, atol=1e-12, rtol=0)
    for index, (input_weight, recurrent_weight, bias, recurrent_bias) in enumerate(twin.all_weights):
        prefix = f"model.layers.{index}."
        torch.testing.assert_close(ours[prefix + "input_weight"], input_weight.grad, atol=1e-12, rtol=0)
        torch.testing.assert_close(ours[prefix + "bias"], bias.grad, atol=1e-12, rtol=0)
        blocks = ours[prefix + "recurrent_weight"]
        for gate, dense in enumerate(recurrent_weight.grad.split(8)):
            mask = torch.block_diag(*torch.ones_like(blocks[gate])).bool()
            torch.testing.assert_close(torch.block_diag(*blocks[gate])[mask], dense[mask], atol=1e-12, rtol=0)
        if cell_type == "gru":
            theirs = recurrent_bias.grad[-8:]
            torch.testing.assert_close(ours[prefix + "candidate_bias"], theirs, atol=1e-12, rtol=0)


@both_cells
@one_and_two_heads
@pytest.mark.parametrize("padded", [False, True])
def test_vmap_over_members_equals_a_loop(cell_type, num_heads, padded):
    members = [small(cell_type, num_heads=num_heads) for _ in range(4)]
    ids = tokens(3, 7)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    parameters, _ = stack_module_state(members)

    def loss(member):
        return functional_call(members[0], member, (), {"input_ids": ids, "attention_mask": mask, "labels": ids}).loss

    with torch.inference_mode():
        losses = vmap(loss)(parameters)
        expected = torch.stack([model(ids, attention_mask=mask, labels=ids).loss for model in members])
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, expected, atol=1e-6, rtol=0)


@both_cells
@one_and_two_heads
def test_bfloat16_weights_and_autocast_stay_near_float32(cell_type, num_heads):
    model, ids = small(cell_type, num_heads=num_heads), tokens(4, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.inference_mode():
        for padding in (None, mask):
            exact = model(ids, attention_mask=padding, labels=ids).loss
            with torch.autocast("cpu", torch.bfloat16):
                cast = model(ids, attention_mask=padding, labels=ids)
                carried = model(ids, attention_mask=padding, state=cast.state, labels=ids)
            assert abs(cast.loss - exact) < 5e-3
            assert abs(carried.loss - exact) < 0.1
        half = model.to(torch.bfloat16)(ids, labels=ids)
        assert half.logits.dtype == half.state.dtype == torch.bfloat16
        assert abs(half.loss - exact) < 1e-2


@pytest.mark.parametrize(("cell_type", "num_heads"), [("lstm", 1), ("gru", 2)])
def test_compiled_model_has_the_same_loss(cell_type, num_heads):
    model, ids = small(cell_type, num_heads=num_heads, num_layers=1), tokens(2, 5)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, labels=ids).loss, model(ids, labels=ids).loss, atol=1e-7, rtol=0)


def test_every_cell_type_has_a_cell():
    assert tuple(CELLS) == CELL_TYPES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cell_type": "elmann"}, "`cell_type` must be one of lstm, gru, got 'elmann'"),
        ({"vocab_size": 0}, "`vocab_size` must be at least 1, got 0"),
        ({"embedding_size": -1}, "`embedding_size` must be at least 1, got -1"),
        ({"hidden_size": 0}, "`hidden_size` must be at least 1, got 0"),
        ({"num_layers": 0}, "`num_layers` must be at least 1, got 0"),
        ({"num_heads": 0}, "`num_heads` must be at least 1, got 0"),
        ({"num_heads": 5}, "`num_heads` must divide `hidden_size`, got 5 and 32; take a divisor"),
        (
            {"tie_word_embeddings": True, "embedding_size": 48},
            "`embedding_size` equal to `hidden_size`, got 48 and 32; make them equal or set",
        ),
    ],
)
def test_bad_configurations_name_field_value_and_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        RNNConfig(**changes)


def test_wrong_calls_are_refused():
    model, ids = small(), tokens(2, 5)
    with pytest.raises(ValueError, match="One of `input_ids` and `inputs_embeds`"):
        model()
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape of the tokens, got \(2, 6\)"):
        model(ids, attention_mask=torch.ones(2, 6))
