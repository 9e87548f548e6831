"""The language model with a simplified DNC against its equations, and what its memory does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo_hf.models import DNCConfig, DNCForCausalLM
from zoo_hf.models.dnc import DNC, DNCState, DNCWeights, dnc, dnc_scan
from zoo_hf.models.modeling_dnc import join_state, slot_addresses, split_state


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
PARAMETERS = {1: "0.30 M", 2: "1.13 M", 4: "4.36 M", 8: "17.1 M", 16: "67.8 M", 32: "269.8 M", 64: "1.076 B"}

empty_or_addressed = pytest.mark.parametrize("initial_memory", [0.0, 0.3], ids=["empty", "addressed"])


@pytest.fixture(autouse=True)
def seeded():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(**changes):
    """A model all of whose sizes and weights differ."""
    sizes = {"vocab_size": 11, "embedding_size": 6, "hidden_size": 8, "memory_slots": 5, "memory_width": 7}
    model = DNCForCausalLM(DNCConfig(**(sizes | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(*shape):
    return torch.randint(11, shape)


def named_weights(cell):
    return DNCWeights(**dict(cell.named_parameters()))


def copied(module, weight, bias):
    """The module of torch, with our parameters."""
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    return module


class Twin:
    """The published equations, one line each, in torch's own modules, one token after the other."""

    def __init__(self, model):
        w, config, dtype = named_weights(model.model.cell), model.config, model.dtype
        hidden, width = config.hidden_size, config.memory_width
        joint, both = config.embedding_size + width, hidden + width
        self.embedding, self.head = model.model.embed_tokens, model.lm_head
        self.input_norm = copied(nn.LayerNorm(joint, dtype=dtype), w.input_norm_weight, w.input_norm_bias)
        self.hidden_norm = copied(nn.LayerNorm(hidden, dtype=dtype), w.hidden_norm_weight, w.hidden_norm_bias)
        self.read_norm = copied(nn.LayerNorm(width, dtype=dtype), w.key_norm_weight[0], w.key_norm_bias[0])
        self.write_norm = copied(nn.LayerNorm(width, dtype=dtype), w.key_norm_weight[1], w.key_norm_bias[1])
        self.memory_norm = nn.LayerNorm(width, elementwise_affine=False, dtype=dtype)
        self.output_norm = copied(nn.LayerNorm(both, dtype=dtype), model.model.norm.weight, model.model.norm.bias)
        self.controller = nn.LSTMCell(joint, hidden, dtype=dtype)
        for theirs, ours in zip(
            self.controller.parameters(), (w.input_weight, w.recurrent_weight, w.bias, 0 * w.bias), strict=True
        ):
            theirs.data.copy_(ours)
        weights, biases = w.interface_weight.split([width] * 4 + [1]), w.interface_bias.split([width] * 4 + [1])
        self.read_key, self.write_key, self.add, self.erase, self.strength = (
            copied(nn.Linear(hidden, len(weight), dtype=dtype), weight, bias)
            for weight, bias in zip(weights, biases, strict=True)
        )

    def step(self, token, h, c, r, memory):
        h, c = self.controller(self.input_norm(torch.cat([self.embedding(token), r], dim=-1)), (h, c))
        out = self.hidden_norm(h)
        scores = torch.einsum("bnw,bw->bn", self.memory_norm(memory), self.write_norm(self.write_key(out)))
        w = torch.sigmoid(self.strength(out)) * torch.softmax(scores, dim=1)
        erase, add = torch.sigmoid(self.erase(out)), torch.tanh(self.add(out))
        memory = memory * (1 - torch.einsum("bn,bw->bnw", w, erase)) + torch.einsum("bn,bw->bnw", w, add)
        scores = torch.einsum("bnw,bw->bn", self.memory_norm(memory), self.read_norm(self.read_key(out)))
        r = torch.einsum("bn,bnw->bw", torch.softmax(scores, dim=1), memory)
        return self.head(self.output_norm(torch.cat([h, r], dim=-1))), DNCState(h, c, r, memory)

    def __call__(self, ids, state):
        logits = []
        for token in ids.unbind(1):
            scores, state = self.step(token, *state)
            logits.append(scores)
        return torch.stack(logits, dim=1), state


def random_state(model, rows):
    """A state whose numbers all differ."""
    config = model.config
    size = 2 * config.hidden_size + config.memory_width * (1 + config.memory_slots)
    return torch.randn(rows, size, dtype=model.dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("start", ["empty", "addressed", "anywhere"])
def test_logits_and_state_equal_the_equations(dtype, start):
    model, ids = small(initial_memory=0.3 if start == "addressed" else 0.0).to(dtype), tokens(3, 30)
    model.config.chunk_length = 12
    state = random_state(model, 3)
    if start != "anywhere":
        state = model.model.initial_state(model.model.embed_tokens(ids))
    expected, final = Twin(model)(ids, split_state(state, 8, 7))
    outputs = model(ids, state=state)
    torch.testing.assert_close(outputs.logits, expected, atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(outputs.state, join_state(final), atol=TOLERANCE[dtype], rtol=0)


def test_gradient_equals_autograd_through_the_equations():
    model, ids = small(initial_memory=0.3).double(), tokens(2, 9)
    start = split_state(model.model.initial_state(model.model.embed_tokens(ids)), 8, 7)
    model(ids, labels=ids).loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    twin = Twin(model)
    logits, _ = twin(ids, start)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    linears = (twin.read_key, twin.write_key, twin.add, twin.erase, twin.strength)
    theirs = {
        "model.embed_tokens.weight": twin.embedding.weight.grad,
        "model.cell.input_norm_weight": twin.input_norm.weight.grad,
        "model.cell.input_norm_bias": twin.input_norm.bias.grad,
        "model.cell.input_weight": twin.controller.weight_ih.grad,
        "model.cell.recurrent_weight": twin.controller.weight_hh.grad,
        "model.cell.bias": twin.controller.bias_ih.grad,
        "model.cell.hidden_norm_weight": twin.hidden_norm.weight.grad,
        "model.cell.hidden_norm_bias": twin.hidden_norm.bias.grad,
        "model.cell.interface_weight": torch.cat([linear.weight.grad for linear in linears]),
        "model.cell.interface_bias": torch.cat([linear.bias.grad for linear in linears]),
        "model.cell.key_norm_weight": torch.stack([twin.read_norm.weight.grad, twin.write_norm.weight.grad]),
        "model.cell.key_norm_bias": torch.stack([twin.read_norm.bias.grad, twin.write_norm.bias.grad]),
        "model.norm.weight": twin.output_norm.weight.grad,
        "model.norm.bias": twin.output_norm.bias.grad,
        "lm_head.weight": twin.head.weight.grad,
        "lm_head.bias": twin.head.bias.grad,
    }
    assert theirs.keys() == ours.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-12, rtol=0)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@empty_or_addressed
def test_gradient_equals_finite_differences(padded, initial_memory):
    """Of outputs and state, by inputs, state and weights."""
    cell = DNC(2, 3, 2).double()
    inputs = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    memory = (initial_memory * torch.randn(2, 3, 2, dtype=torch.float64)).requires_grad_()
    before = [torch.randn(2, size, dtype=torch.float64, requires_grad=True) for size in (3, 3, 2)]
    real = torch.tensor([[True, False, True], [False, True, True]]) if padded else None

    def run(inputs, h, c, read, memory, *weights):
        outputs, state = dnc(inputs, DNCState(h, c, read, memory), DNCWeights(*weights), real)
        return outputs, *state

    assert torch.autograd.gradcheck(run, (inputs, *before, memory, *named_weights(cell)), atol=1e-6)


@pytest.mark.parametrize("scale", PARAMETERS)
def test_presets_have_the_published_numbers_of_parameters(scale):
    with torch.device("meta"):
        model = DNCForCausalLM(DNCConfig.preset(scale))
    size = 128 * scale
    count = model.num_parameters()
    assert count == 16 * size**2 + (23 + 3 * 100) * size + 101
    digits = len(PARAMETERS[scale].split()[0].partition(".")[2])
    shown = f"{count / 1e9:.{digits}f} B" if scale == 64 else f"{count / 1e6:.{digits}f} M"
    assert shown == PARAMETERS[scale]


def test_a_preset_takes_other_fields_and_no_scale_below_one():
    config = DNCConfig.preset(2, vocab_size=256, memory_slots=16)
    assert (config.vocab_size, config.memory_slots, config.memory_width, config.head_size) == (256, 16, 256, 256)
    with pytest.raises(ValueError, match="`scale` must be at least 1, got 0"):
        DNCConfig.preset(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_memory_gives_finite_scores_and_gradients(dtype):
    model, ids = small().to(dtype), tokens(2, 4)
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert outputs.logits.isfinite().all()
    assert outputs.state.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_slots_that_start_equal_stay_equal_and_the_keys_have_no_effect():
    model, other, ids = small(memory_slots=32), small(memory_slots=32), tokens(2, 60)
    cell = model.model.cell
    state = split_state(model(ids).state, 8, 7)
    assert state.memory.abs().max() > 0.1
    torch.testing.assert_close(state.memory, state.memory[:, :1].expand(2, 32, 7), atol=1e-6, rtol=0)
    torch.testing.assert_close(state.read, state.memory[:, 0], atol=1e-6, rtol=0)
    logits = {}
    for initial_memory in (0.0, 0.3):
        model.config.initial_memory = initial_memory
        logits[initial_memory] = model(ids).logits
    with torch.no_grad():
        cell.interface_weight[:14] = other.model.cell.interface_weight[:14] + 1
        cell.key_norm_weight.mul_(-2)
    for initial_memory, effect in ((0.0, False), (0.3, True)):
        model.config.initial_memory = initial_memory
        changed = (model(ids).logits - logits[initial_memory]).abs().max()
        assert (changed > 1e-3) == effect
        assert effect or changed < 1e-5


def test_initial_memory_gives_every_slot_an_address_of_its_own():
    for slots, width in ((5, 7), (64, 16), (16, 64), (128, 128)):
        addresses = slot_addresses(slots, width, torch.empty(0))
        assert addresses.square().mean().item() == pytest.approx(1, rel=0.1)
        normed = F.layer_norm(addresses, (width,))
        nearest = (normed @ normed.T / width - torch.eye(slots)).max()
        assert nearest < 0.85
    model = small(initial_memory=0.25)
    state = split_state(model.model.initial_state(torch.empty(3, 1, 6)), 8, 7)
    torch.testing.assert_close(state.memory, 0.25 * slot_addresses(5, 7, torch.empty(0)).expand(3, 5, 7))
    assert not any(part.any() for part in state[:3])


def commanded(cell, *, read_key, write_key, add, strength):
    """The weights of a controller that gives these commands, whatever it reads, and erases all it overwrites."""
    logit = torch.tensor([40.0 if strength else -200.0])
    bias = torch.cat([read_key, write_key, add.atanh(), torch.full_like(add, 40.0), logit])
    sharp = torch.full_like(cell.key_norm_weight, 20.0)
    weights = named_weights(cell)._replace(interface_bias=bias, key_norm_weight=sharp)
    return weights._replace(interface_weight=torch.zeros_like(weights.interface_weight))


def test_written_vectors_are_read_back_by_their_own_keys():
    """Two vectors overwrite the slots that their write keys name; then each is found by what it holds."""
    cell, inputs = DNC(4, 6, 16).requires_grad_(False), torch.randn(1, 1, 4)
    memory = torch.randn(1, 8, 16)
    first, second = 0.9 * torch.rand(2, 16) - 0.45
    state = DNCState(torch.zeros(1, 6), torch.zeros(1, 6), torch.zeros(1, 16), memory)
    for slot, vector in ((2, first), (5, second)):
        commands = {"read_key": vector, "write_key": memory[0, slot], "add": vector, "strength": True}
        _, state = dnc_scan(inputs, state, commanded(cell, **commands))
        torch.testing.assert_close(state.read[0], vector, atol=1e-5, rtol=0)
    expected = memory.clone()
    expected[0, 2], expected[0, 5] = first, second
    torch.testing.assert_close(state.memory, expected, atol=1e-5, rtol=0)
    for key, vector in ((first, first), (second, second), (memory[0, 7], memory[0, 7])):
        commands = {"read_key": key, "write_key": key, "add": torch.zeros(16), "strength": False}
        outputs, after = dnc_scan(inputs, state, commanded(cell, **commands))
        torch.testing.assert_close(after.read[0], vector, atol=1e-5, rtol=0)
        assert torch.equal(outputs[0, 0], torch.cat([after.h[0], after.read[0]]))
        assert torch.equal(after.memory, state.memory)


@empty_or_addressed
def test_padding_holds_every_bit_of_the_state(initial_memory):
    model, ids = small(initial_memory=initial_memory), tokens(2, 6)
    state = model(ids).state
    mask = torch.tensor([[0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]])
    padded = model(ids, attention_mask=mask, state=state)
    assert torch.equal(padded.state[0], state[0])
    torch.testing.assert_close(padded.state[1], model(ids[1:, :3], state=state[1:]).state[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(padded.logits[1, 3:], padded.logits[1, 2].expand(3, 11), atol=1e-6, rtol=0)


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 64, "memory_width": 64, "memory_slots": 64}], ids=["8", "64"])
@empty_or_addressed
def test_long_sequences_are_the_same_in_chunks_and_near_float64(initial_memory, sizes):
    model, ids = DNCForCausalLM(DNCConfig(initial_memory=initial_memory, **sizes)).eval(), tokens(2, 300)
    with torch.inference_mode():
        whole = model(ids)
        model.config.chunk_length = 64
        chunked = model(ids)
        exact = model.double()(ids)
    torch.testing.assert_close(chunked.logits, whole.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(chunked.state, whole.state, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.logits.double(), exact.logits, atol=1e-3, rtol=0)


def test_the_state_is_float32_under_bfloat16_weights_and_autocast():
    """What a token writes is far below the spacing of bfloat16: a rounded memory would not feel it."""
    model, ids = small(memory_slots=500), tokens(2, 100)
    with torch.inference_mode():
        exact = split_state(model(ids).state, 8, 7)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(ids)
        model.to(torch.bfloat16)
        half = model(ids)
        continued = model(ids[:, 90:], state=model(ids[:, :90]).state)
    assert half.logits.dtype == cast.logits.dtype == torch.bfloat16
    assert half.state.dtype == cast.state.dtype == torch.float32
    assert torch.equal(continued.state, half.state)
    for outputs in (half, cast):
        memory = split_state(outputs.state, 8, 7).memory
        assert (memory != memory.bfloat16()).float().mean() > 0.9
        torch.testing.assert_close(memory, exact.memory, atol=2e-2 * exact.memory.abs().max().item(), rtol=0)
    assert model.double()(ids).state.dtype == torch.float64


def test_initial_weights_are_xavier_uniform_and_biases_zero():
    model = DNCForCausalLM(DNCConfig.preset(1, hidden_size=64))
    w = named_weights(model.model.cell)
    matrices = {"head": model.lm_head.weight, "embedding": model.model.embed_tokens.weight}
    matrices |= {"input": w.input_weight, "recurrent": w.recurrent_weight}
    matrices |= dict(zip(("read_key", "write_key", "add", "erase"), w.interface_weight[:512].split(128), strict=True))
    for matrix in matrices.values():
        bound = (6 / sum(matrix.shape)) ** 0.5
        assert 0.99 * bound < matrix.abs().max() <= bound
        assert matrix.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    for norm in (w.input_norm_weight, w.hidden_norm_weight, model.model.norm.weight, 128**0.5 * w.key_norm_weight):
        torch.testing.assert_close(norm, torch.ones_like(norm))
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_parameters_that_a_checkpoint_has_are_kept_where_others_are_missing():
    model = small()
    saved = {name: value.clone() for name, value in model.state_dict().items() if name != "model.cell.bias"}
    loaded = DNCForCausalLM.from_pretrained(None, config=model.config, state_dict=saved)
    assert not loaded.model.cell.bias.any()
    for name, value in saved.items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_learns_to_copy_by_backpropagation_through_time():
    """Three of four letters and a separator, then the letters again: a guess is right once in four."""
    model = DNCForCausalLM(DNCConfig(vocab_size=5, memory_slots=8)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def strings(count):
        letters = torch.randint(1, 5, (count, 3))
        ids = torch.cat([letters, torch.zeros(count, 1, dtype=torch.long), letters], dim=1)
        return ids, torch.cat([torch.full((count, 4), -100), letters], dim=1)

    for _ in range(120):
        ids, labels = strings(32)
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        optimizer.step()
    ids, _ = strings(500)
    right = model(ids).logits[:, 3:-1].argmax(-1) == ids[:, 4:]
    assert right.float().mean() > 0.8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "`vocab_size` must be at least 1, got 0"),
        ({"embedding_size": -1}, "`embedding_size` must be at least 1, got -1"),
        ({"hidden_size": 0}, "`hidden_size` must be at least 1, got 0"),
        ({"memory_slots": 0}, "`memory_slots` must be at least 1, got 0"),
        ({"memory_width": 0}, "`memory_width` must be at least 1, got 0"),
        ({"chunk_length": 0}, "`chunk_length` must be at least 1, got 0"),
        ({"tie_word_embeddings": True}, r"equal to `hidden_size \+ memory_width`, got 32 and 64; make them equal"),
    ],
)
def test_bad_configurations_name_field_value_and_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        DNCConfig(**changes)
