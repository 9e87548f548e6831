"""RWKV-7 against flash-linear-attention (fla) and the paper's equations, and its two recurrences to each other."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small_models import SMALL
from torch.func import functional_call, stack_module_state, vmap

from zoo_hf.models import RWKV7Config, RWKV7ForCausalLM, convert_rwkv7
from zoo_hf.models.convert_rwkv7 import ATTENTION, LORA, OUTER, PARTS, read_weights
from zoo_hf.models.rwkv7 import BLOCK, Steps, previous_tokens, rwkv7_blocks, rwkv7_scan


FLA = Path(__file__).parent / "data" / "rwkv7_fla"  # a checkpoint that fla 0.6.0 saved, and its answers
FLA_SCRIPT = Path(__file__).parent / "scripts" / "rwkv7_fla.py"  # which made them
FASTEST = -(2.718281828459045**-0.5)  # log of the fastest decay that the model knows


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def near(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def displaced(**config):
    """A small model with every weight displaced: what starts as zero or one would hide an error behind it."""
    model = SMALL["rwkv7"](**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def random_steps(length, dtype=torch.float32, rows=3, heads=2, size=8):
    """Inputs of the recurrence, with outputs near one, and a state."""

    def normal():
        return torch.randn(rows, length, heads, size, dtype=dtype)

    log_decay, kappa, rate = FASTEST * (3 * normal()).sigmoid(), F.normalize(normal(), dim=-1), normal().sigmoid()
    steps = Steps(r=normal() / size, log_decay=log_decay, k=normal(), v=normal(), kappa=kappa, rate=rate)
    return steps, torch.randn(rows, heads, size, size, dtype=dtype)


@pytest.mark.parametrize("length", [1, BLOCK, 2 * BLOCK + 5, 10 * BLOCK])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_blocks_equal_the_scan(length, dtype, tolerance):
    steps, state = random_steps(length, dtype)
    before = state.clone()
    for ours, plain in zip(rwkv7_blocks(steps, state), rwkv7_scan(steps, state), strict=True):
        near(ours, plain, tolerance)
    assert torch.equal(state, before)


@pytest.mark.parametrize("log_decay", [FASTEST, 0.0])
def test_blocks_are_exact_at_the_fastest_and_at_no_decay_with_one_key_overwritten_at_every_step(log_decay):
    steps, state = random_steps(6 * BLOCK, torch.float64)
    steps = steps._replace(
        log_decay=torch.full_like(steps.log_decay, log_decay),
        kappa=steps.kappa[:, :1].expand_as(steps.kappa),
        rate=torch.ones_like(steps.rate),
    )
    expected = rwkv7_scan(steps, state)
    for ours, exact in zip(rwkv7_blocks(Steps(*(s.float() for s in steps)), state.float()), expected, strict=True):
        near(ours.double(), exact, 1e-5)


def test_gradients_of_blocks_equal_those_of_the_scan():
    steps, state = random_steps(2 * BLOCK + 3, torch.float64)
    leaves = [entries.requires_grad_() for entries in (*steps, state)]
    gradients = []
    for recurrence in (rwkv7_blocks, rwkv7_scan):
        outputs, after = recurrence(Steps(*leaves[:-1]), leaves[-1])
        gradients.append(torch.autograd.grad(outputs.sin().sum() + after.cos().sum(), leaves))
    for ours, plain in zip(*gradients, strict=True):
        near(ours, plain, 1e-10)


def test_a_key_of_rate_one_is_replaced_and_orthogonal_keys_are_kept():
    """After writing v at k = κ with a = 1 and no decay, reading at k gives v whatever S held there before."""
    state, eye = torch.randn(1, 1, 4, 4), torch.eye(4)
    key, value = eye[2].view(1, 1, 1, 4), torch.randn(1, 1, 1, 4)
    steps = Steps(r=key, log_decay=torch.zeros_like(key), k=key, v=value, kappa=key, rate=torch.ones_like(key))
    for recurrence in (rwkv7_scan, rwkv7_blocks):
        output, after = recurrence(steps, state)
        near(output, value, 1e-6)
        near(after[0, 0, [0, 1, 3]], state[0, 0, [0, 1, 3]], 1e-6)


def test_previous_token_is_the_last_real_one():
    inputs, before = torch.arange(1.0, 7).view(1, 6, 1), torch.tensor([[9.0]])
    shifted, last = previous_tokens(inputs, before, None)
    assert shifted.flatten().tolist() == [9, 1, 2, 3, 4, 5]
    assert last.item() == 6
    shifted, last = previous_tokens(inputs, before, torch.tensor([[0, 1, 0, 0, 1, 0]]).bool())
    assert shifted.flatten().tolist() == [9, 9, 2, 2, 2, 5]
    assert last.item() == 5
    assert previous_tokens(inputs, before, torch.zeros(1, 6).bool())[1].item() == 9


def test_padding_and_steps_and_chunks_change_nothing_in_blocks_either():
    model, ids = displaced(), torch.randint(11, (3, 3 * BLOCK))
    mask = torch.ones_like(ids)
    mask[0, : BLOCK + 2], mask[1, -BLOCK - 1 :], mask[2, 5:-9:3] = 0, 0, 0
    padded = model(ids, attention_mask=mask)
    for row in range(3):
        real = mask[row].bool()
        alone = model(ids[row, real][None])
        near(padded.logits[row, real], alone.logits[0])
        near(padded.state[row], alone.state[0])
    model.config.chunk_length = BLOCK + 3
    near(model(ids, attention_mask=mask).logits[mask.bool()], padded.logits[mask.bool()])
    model.config.chunk_length = 1
    near(model(ids, attention_mask=mask).logits[mask.bool()], padded.logits[mask.bool()])


def test_state_is_float32_and_holds_the_last_inputs_and_the_matrices():
    model, ids = displaced(hidden_size=8, head_dim=4).to(torch.bfloat16), torch.randint(11, (2, 5))
    seen = []
    for layer in model.model.layers:
        layer.attn_norm.register_forward_hook(lambda module, args, output: seen.append(output[:, -1]))
        layer.ffn_norm.register_forward_hook(lambda module, args, output: seen.append(output[:, -1]))
    state = model(ids).state
    assert state.dtype == torch.float32
    assert state.shape == (2, 2, 2 + 4, 8)
    assert torch.equal(state[:, :, :2].flatten(1, 2), torch.stack(seen, dim=1).float())
    assert model.double()(ids).state.dtype == torch.float64


def test_blocks_under_vmap_equal_a_loop():
    members, ids = [displaced() for _ in range(3)], torch.randint(11, (2, BLOCK + 4))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    parameters, _ = stack_module_state(members)
    arguments = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    with torch.inference_mode():
        losses = vmap(lambda member: functional_call(members[0], member, (), arguments).loss)(parameters)
        near(losses, torch.stack([model(**arguments).loss for model in members]), 2e-6)


def test_traced_blocks_have_the_same_loss():
    model, ids = displaced(), torch.randint(11, (2, 2 * BLOCK))
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        near(compiled(ids, labels=ids).loss, model(ids, labels=ids).loss, 1e-6)


def original_names(weights):
    """Our weights as the authors' file has them, with the layer-0 value mix that some files have."""
    modules = {ours: theirs for table in (OUTER, PARTS, ATTENTION) for theirs, ours in table.items()}
    theirs = {"blocks.0.att.v0": torch.zeros(1, 1, 8), "blocks.0.att.v1": torch.zeros(8, 2)}
    for name, weight in weights.items():
        for ours in sorted(modules, key=len, reverse=True):
            name = re.sub(rf"(^|\.){re.escape(ours)}(?=\.)", rf"\g<1>{modules[ours]}", name)
        name = name.replace("model.layers", "blocks")
        for digit, part in LORA.items():
            name = re.sub(rf"([wavg])_lora\.{re.escape(part)}", rf"\g<1>{digit}", name)
        is_map = re.search(r"att\.[wavg][12]$", name)
        wide = weight.dim() == 1 and not name.endswith((".weight", ".bias"))
        theirs[name] = weight.mT if is_map else weight.view(1, 1, -1) if wide else weight
    return theirs


class Paper:
    """The equations of arXiv:2503.14456 for one token after the other, in float64; states as there, (V, K)."""

    def __init__(self, weights, heads):
        self.weights = {name: weight.double().squeeze() for name, weight in weights.items()}
        self.heads = heads
        self.states = {}

    def __call__(self, name, x=None):
        weight = self.weights[name]
        return weight if x is None else weight @ x

    def norm(self, name, x):
        return F.layer_norm(x, x.shape, self(f"{name}.weight"), self(f"{name}.bias"), 1e-5)

    def shift(self, name, x):
        """x_{t−1}, and x_t is kept for the next token."""
        before = self.states.get(name, torch.zeros_like(x))
        self.states[name] = x
        return before

    def time_mix(self, block, x, first_value):
        att, before = f"{block}.att", self.shift(f"{block}.att", x)
        x_r, x_w, x_k, x_v, x_a, x_g = (torch.lerp(x, before, self(f"{att}.x_{name}")) for name in "rwkvag")
        r, k, v = (
            self(f"{att}.receptance.weight", x_r),
            self(f"{att}.key.weight", x_k),
            self(f"{att}.value.weight", x_v),
        )
        d = self(f"{att}.w0") + torch.tanh(x_w @ self(f"{att}.w1")) @ self(f"{att}.w2")
        w = torch.exp(-torch.exp(-F.softplus(-d) - 0.5))  # the authors' code; the paper's exp(−e^(−1/2) σ(d))
        a = torch.sigmoid(self(f"{att}.a0") + x_a @ self(f"{att}.a1") @ self(f"{att}.a2"))
        g = torch.sigmoid(x_g @ self(f"{att}.g1")) @ self(f"{att}.g2")
        if first_value is not None:
            v = torch.lerp(
                v, first_value, torch.sigmoid(self(f"{att}.v0") + x_v @ self(f"{att}.v1") @ self(f"{att}.v2"))
            )
        removal, replacement = k * self(f"{att}.k_k"), k * torch.lerp(torch.ones_like(a), a, self(f"{att}.k_a"))
        outputs = []
        for head, part in enumerate(torch.arange(len(x)).chunk(self.heads)):
            unit = removal[part] / removal[part].norm()
            size, name = len(part), f"{att}.{head}"
            wkv = self.states.get(name, torch.zeros(size, size, dtype=x.dtype))
            wkv = wkv @ (torch.diag(w[part]) - torch.outer(unit, a[part] * unit)) + torch.outer(
                v[part], replacement[part]
            )
            self.states[name] = wkv
            p = F.layer_norm(wkv @ r[part], (size,), eps=size * 1e-5)
            p = p * self(f"{att}.ln_x.weight")[part] + self(f"{att}.ln_x.bias")[part]
            outputs.append(p + (r[part] * self(f"{att}.r_k")[head] * replacement[part]).sum() * v[part])
        return self(f"{att}.output.weight", g * torch.cat(outputs)), v if first_value is None else first_value

    def channel_mix(self, block, x):
        mixed = torch.lerp(x, self.shift(f"{block}.ffn", x), self(f"{block}.ffn.x_k"))
        return self(f"{block}.ffn.value.weight", torch.relu(self(f"{block}.ffn.key.weight", mixed)) ** 2)

    def logits(self, token, layers):
        x, first_value = self.norm("blocks.0.ln0", self("emb.weight")[token]), None
        for block in (f"blocks.{layer}" for layer in range(layers)):
            mixed, first_value = self.time_mix(block, self.norm(f"{block}.ln1", x), first_value)
            x = x + mixed
            x = x + self.channel_mix(block, self.norm(f"{block}.ln2", x))
        return self("head.weight", self.norm("ln_out", x))


def test_model_computes_the_papers_equations():
    model, ids = displaced(num_hidden_layers=3).double(), torch.randint(11, (2, BLOCK + 4))
    logits = model(ids).logits
    for row in range(2):
        paper = Paper(original_names(model.state_dict()), heads=2)
        near(logits[row], torch.stack([paper.logits(token, layers=3) for token in ids[row]]), 1e-9)


def test_the_authors_file_loads_with_its_sizes(tmp_path):
    model, ids = displaced(num_hidden_layers=3), torch.randint(11, (2, 9))
    names = original_names(model.state_dict())
    assert {"emb.weight", "blocks.2.att.receptance.weight", "blocks.1.att.w2", "blocks.0.ffn.x_k"} <= names.keys()
    assert names["blocks.1.att.w1"].shape == (8, 3)
    torch.save(names, tmp_path / "model.pth")
    for source in (tmp_path / "model.pth", names):
        loaded = RWKV7ForCausalLM.from_original(source)
        assert loaded.config.intermediate_size == 12
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    half = RWKV7ForCausalLM.from_original(tmp_path / "model.pth", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_a_file_of_another_model_is_refused():
    names = original_names(displaced().state_dict())
    names["blocks.0.att.time_decay"] = names.pop("blocks.0.att.w0")
    with pytest.raises(ValueError, match=r"not those of an RWKV-7 model: (?=.*w_lora\.lora\.2\.bias)(?=.*time_decay)"):
        RWKV7ForCausalLM.from_original(names)


@pytest.mark.parametrize("weights", [{}, {"backbone.embeddings.weight": torch.zeros(3, 2)}])
def test_weights_that_have_nothing_of_it_are_refused(weights):
    for load in (RWKV7ForCausalLM.from_original, RWKV7ForCausalLM.from_fla):
        with pytest.raises(ValueError, match=r"not those of an RWKV-7 model: (none at all|backbone\.embeddings)"):
            load(weights)


@pytest.fixture(scope="module")
def answers():
    return load_file(FLA / "answers.safetensors")


def assert_same_function(model, answers, name):
    """Logits with and without padding, and the state, are those of fla."""
    ids, mask = answers["ids"], answers["mask"]
    with torch.no_grad():
        outputs, masked = model(ids), model(ids, attention_mask=mask)
    near(outputs.logits, answers[f"{name} logits"])
    near(masked.logits[mask.bool()], answers[f"{name} masked logits"][mask.bool()])
    heads = (model.config.num_heads, model.config.head_dim)
    near(outputs.state[:, :, 2:].unflatten(-1, heads).transpose(2, 3), answers[f"{name} matrices"], 2e-5)
    near(outputs.state[:, :, :2], answers[f"{name} inputs"])


@pytest.mark.parametrize("fuse_norm", [False, True])
def test_a_checkpoint_of_fla_loads_and_computes_what_fla_computes(tmp_path, answers, fuse_norm):
    shutil.copytree(FLA, tmp_path, dirs_exist_ok=True)
    fields = json.loads((FLA / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"fuse_norm": fuse_norm}))
    model = RWKV7ForCausalLM.from_pretrained(tmp_path)
    assert model.config.key_eps == (1e-6 if fuse_norm else 1e-24)
    assert_same_function(model, answers, f"fuse_norm={fuse_norm}")


def test_older_checkpoints_of_fla_with_packed_mixes_load(tmp_path, answers):
    weights = load_file(FLA / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.attn.x_"
        weights[f"{prefix}x"] = torch.stack([weights.pop(prefix + mix) for mix in "rwkvag"])
    shutil.copy(FLA / "config.json", tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"packed in `attn.x_x`; use `RWKV7ForCausalLM.from_fla`"):
        RWKV7ForCausalLM.from_pretrained(tmp_path)
    assert_same_function(RWKV7ForCausalLM.from_fla(tmp_path), answers, "fuse_norm=False")
    assert_same_function(RWKV7ForCausalLM.from_fla(weights), answers, "fuse_norm=True")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"No weights \(model\*.safetensors or pytorch_model\*.bin\) in "):
        RWKV7ForCausalLM.from_fla(tmp_path)
    names = sorted(weights)
    for index, part in enumerate((names[:20], names[20:])):
        torch.save({name: weights[name] for name in part}, tmp_path / f"pytorch_model-{index}.bin")
    assert_same_function(RWKV7ForCausalLM.from_fla(tmp_path), answers, "fuse_norm=False")


def test_a_name_that_is_no_folder_is_looked_up_on_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(convert_rwkv7, "snapshot_download", lambda name, **what: asked.append((name, what)) or FLA)
    assert read_weights("someone/rwkv7").keys() == load_file(FLA / "model.safetensors").keys()
    assert asked == [("someone/rwkv7", {"allow_patterns": ["model*.safetensors", "pytorch_model*.bin"]})]


def test_a_loaded_checkpoint_is_saved_as_one_of_ours(tmp_path, answers):
    RWKV7ForCausalLM.from_pretrained(FLA).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "zoo_rwkv7"
    assert_same_function(RWKV7ForCausalLM.from_pretrained(tmp_path), answers, "fuse_norm=False")


def test_initial_weights_are_those_of_fla(answers):
    """All that are not random; and for the others their lengths, which are zero, or one, or a tenth."""
    config = RWKV7Config.from_pretrained(FLA)
    parameters = dict(RWKV7ForCausalLM(config).named_parameters())
    initial = {name.removeprefix("initial "): value for name, value in answers.items() if name.startswith("initial ")}
    assert len(initial) == 36
    for name, value in initial.items():
        near(parameters[name], value, 1e-6)
    for name, value in parameters.items():
        lengths = value.detach().norm(dim=-1)
        if name.endswith(("r_proj.weight", "v_proj.weight")):
            near(lengths, torch.ones(32))
        elif name.endswith("k_proj.weight"):
            near(lengths, torch.full((32,), 0.1))
        elif name.endswith("lora.2.weight"):
            near(value.mT @ value, 0.01 * torch.eye(value.shape[1]), 1e-6)
        elif name.endswith(("o_proj.weight", "ffn.value.weight")):
            assert not lengths.any()  # in fla o_proj is random
    near(parameters["model.layers.1.ffn.key.weight"].mT @ parameters["model.layers.1.ffn.key.weight"], torch.eye(32))
    near(parameters["lm_head.weight"] @ parameters["lm_head.weight"].mT, 0.25 * torch.eye(23))
    assert 0.09 < parameters["model.embeddings.weight"].abs().max() <= 0.1  # in fla 1e-4


def test_a_model_made_in_bfloat16_starts_from_the_same_weights():
    config = SMALL["rwkv7"]().config
    exact, half = RWKV7ForCausalLM(config), RWKV7ForCausalLM._from_config(config, dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        assert parameter.dtype == torch.bfloat16
        if "_proj" not in name and parameter.dim() != 2:
            near(parameter.float(), exact.get_parameter(name), 5e-3)
    receptance = half.model.layers[0].attn.r_proj.weight.float()
    near(receptance.mT @ receptance, torch.eye(8), 2e-2)


@pytest.mark.skipif(
    not (importlib.util.find_spec("fla") and importlib.util.find_spec("triton")),
    reason="needs the packages flash-linear-attention 0.6.0, fla-core and triton",
)
def test_fla_itself_still_gives_the_committed_answers(tmp_path, answers):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, FLA_SCRIPT, tmp_path], env=environment, check=True, capture_output=True)
    again = load_file(tmp_path / "answers.safetensors")
    assert again.keys() == answers.keys()
    for name, value in again.items():
        near(value, answers[name])
    assert_same_function(RWKV7ForCausalLM.from_pretrained(tmp_path), again, "fuse_norm=False")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "`vocab_size` must be at least 1, got 0"),
        ({"hidden_size": -64}, "`hidden_size` must be at least 1, got -64"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be at least 1, got 0"),
        ({"gate_low_rank_dim": 0}, "`gate_low_rank_dim` must be at least 1, got 0"),
        ({"intermediate_size": 0}, "`intermediate_size` must be at least 1, got 0"),
        ({"head_dim": 48}, "`head_dim` must divide `hidden_size`, got 48 and 64; take a divisor"),
    ],
)
def test_bad_configurations_name_field_value_and_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        RWKV7Config(**changes)


def test_ranks_and_channel_mix_grow_with_the_model_unless_given():
    assert RWKV7Config(hidden_size=768).ranks == {"w": 64, "a": 64, "v": 32, "g": 128}
    assert RWKV7Config(hidden_size=4096, head_dim=128).ranks == {"w": 320, "a": 320, "v": 224, "g": 320}
    assert RWKV7Config(hidden_size=768, v_low_rank_dim=5).ranks["v"] == 5
    assert RWKV7Config(hidden_size=768).channel_mix_size == 3072


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value_dim": [32, 64]}, r"`value_dim` must be `hidden_size`, got \[32, 64\] and 32"),
        ({"value_dim": 64}, "`value_dim` must be `hidden_size`, got 64 and 32"),
        ({"attn": {"layers": [1]}}, r"`attn` must be None, got \{'layers': \[1\]\}; take a model without"),
        ({"hidden_act": "silu"}, "`hidden_act` must be \"sqrelu\", got 'silu'"),
    ],
)
def test_what_fla_can_compute_and_this_model_not_is_refused(tmp_path, changes, message):
    fields = json.loads((FLA / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | changes))
    with pytest.raises(ValueError, match=message):
        RWKV7Config.from_pretrained(tmp_path)


def test_a_configuration_of_fla_has_its_defaults(tmp_path):
    sparse = {"model_type": "rwkv7", "head_dim": None, "num_heads": 16, "hidden_ratio": 3.5, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(sparse))
    config = RWKV7Config.from_pretrained(tmp_path)
    assert (config.hidden_size, config.head_dim, config.intermediate_size) == (2048, 128, 7168)
    assert config.ranks == {"w": 64, "a": 64, "v": 16, "g": 128}
    assert (config.dtype, config.bos_token_id, config.key_eps) == (torch.bfloat16, 1, 1e-6)
