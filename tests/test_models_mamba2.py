"""Our Mamba-2 against transformers', its blocks of matrix products against the plain scan, and its saved folders."""

import inspect
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.utils import logging

from zoo_hf.models import ZooMamba2Config, ZooMamba2ForCausalLM, ZooMamba2Model
from zoo_hf.models.mamba2 import (
    LayerState,
    SSDInputs,
    decay_between,
    layer_state_size,
    shifted_sum,
    short_convolution,
    split_state,
    ssd,
    ssd_blocks,
    ssd_scan,
)


# older transformers normalise over all groups at once, and draw their initial weights in another order
OLD = "group_size" not in inspect.signature(MambaRMSNormGated).parameters
SIZES = {"vocab_size": 19, "hidden_size": 16, "num_heads": 4, "head_dim": 8, "state_size": 6, "num_hidden_layers": 2}
CONFIGS = {
    "one group": {"n_groups": 1},
    "two groups": {"n_groups": 2},
    "a group per head": {"n_groups": 4},
    "all biases": {"use_bias": True, "n_groups": 1},
    "no biases": {"use_conv_bias": False, "n_groups": 1},
    "steps within limits": {"time_step_limit": (0.3, 0.9), "n_groups": 1},
    "tied head": {"tie_word_embeddings": True, "n_groups": 1},
    "other sizes": {
        "conv_kernel": 2,
        "chunk_size": 7,
        "expand": 4,
        "num_heads": 8,
        "n_groups": 1,
        "hidden_act": "gelu",
    },
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    logging.set_verbosity_error()  # transformers says at length that its kernels are not installed
    yield
    logging.set_verbosity_warning()


def theirs(**config):
    """transformers' model, every weight displaced: what starts as zero or one would hide an error behind it."""
    if OLD and config.get("n_groups", 1) > 1:
        pytest.skip("this transformers normalises over all groups at once")
    model = Mamba2ForCausalLM(Mamba2Config(**(SIZES | {"n_groups": 1} | config))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ours(**config):
    return ZooMamba2ForCausalLM(ZooMamba2Config(**(SIZES | {"n_groups": 1} | config))).eval()


def pair(**config):
    """transformers' model, and ours with its weights."""
    their, our = theirs(**config), ours(**config)
    our.load_state_dict(their.state_dict())
    return their, our


def tokens(*shape):
    return torch.randint(SIZES["vocab_size"], shape)


def near(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


def ssd_inputs(length, groups, dtype=torch.float64):
    """Two sequences with heads of very different decay, of which the second holds its state in between."""
    heads = 4 // groups
    x = torch.randn(2, length, groups, heads, 5, dtype=dtype)
    b, c = torch.randn(2, 2, length, groups, 3, dtype=dtype)
    step = F.softplus(torch.randn(2, length, groups, heads, dtype=dtype))
    step[1, length // 3 : length // 2] = 0
    rates = -torch.tensor([0.01, 0.5, 3, 40], dtype=dtype).view(groups, heads)
    return SSDInputs(x, step, b, c), rates, torch.randn(2, groups, 3, heads, 5, dtype=dtype)


@torch.inference_mode()
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("length", [1, 9, 70])
def test_logits_equal_transformers(config, length):
    their, our = pair(**config)
    ids = tokens(2, length)
    near(our(ids).logits, their(ids).logits)


@torch.inference_mode()
def test_logits_equal_transformers_over_600_tokens():
    their, our = pair(hidden_size=64, num_heads=8, head_dim=16, state_size=32)
    ids = tokens(1, 600)
    near(our(ids).logits, their(ids).logits)
    our.config.chunk_length = 256
    near(our(ids).logits, their(ids).logits)


@torch.inference_mode()
def test_loss_equals_transformers():
    their, our = pair()
    ids = tokens(3, 40)
    assert abs(our(ids, labels=ids).loss - their(ids, labels=ids).loss) < 1e-6


def test_gradient_equals_transformers():
    their, our = pair()
    ids = tokens(2, 40)
    their(ids, labels=ids).loss.backward()
    our(ids, labels=ids).loss.backward()
    for name, parameter in their.named_parameters():
        near(our.get_parameter(name).grad, parameter.grad, 1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float32_as_transformers(dtype):
    their, our = pair(hidden_size=64, num_heads=8, head_dim=16, state_size=32)
    ids = tokens(4, 100)
    exact = their(ids).logits
    error = (our.to(dtype)(ids).logits - exact).square().mean()
    assert error < 1.5 * (their.to(dtype)(ids).logits - exact).square().mean()


@torch.inference_mode()
def test_generated_text_equals_transformers():
    their, our = pair(pad_token_id=0, eos_token_id=None)
    ids = torch.randint(1, SIZES["vocab_size"], (3, 6))
    how = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(our.generate(ids, **how), their.generate(ids, **how))


@pytest.mark.skipif(OLD, reason="this transformers draws them in another order")
def test_initial_weights_are_the_ones_that_transformers_draws():
    for config in ({"n_groups": 2}, {"use_bias": True}):
        torch.manual_seed(1)
        expected = Mamba2ForCausalLM(Mamba2Config(**(SIZES | {"n_groups": 1} | config))).state_dict()
        torch.manual_seed(1)
        drawn = ours(**config).state_dict()
        assert drawn.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(drawn[name], value), name


def test_rescaled_output_projections_are_smaller_by_the_root_of_the_depth():
    bound = 32**-0.5
    for rescale, expected in ((False, bound), (True, bound / 2)):
        model = ours(num_hidden_layers=4, rescale_prenorm_residual=rescale)
        for layer in model.backbone.layers:
            assert 0.97 * expected < layer.mixer.out_proj.weight.abs().max() <= expected


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("block", [1, 5, 16, 64])
def test_blocks_equal_the_plain_scan(groups, block):
    inputs, rates, state = ssd_inputs(40, groups)
    before = state.clone()
    outputs, after = ssd_blocks(inputs, rates, state, block)
    expected, final = ssd_scan(inputs, rates, state)
    near(outputs, expected, 1e-12)
    near(after, final, 1e-12)
    assert torch.equal(state, before)


def test_the_plain_scan_is_the_recurrence_written_out():
    inputs, rates, state = ssd_inputs(6, 2)
    outputs, after = ssd_scan(inputs, rates, state)
    for row, group, head in ((0, 0, 1), (1, 1, 0)):
        s = state[row, group, :, head]  # (N, P)
        for t in range(6):
            step = inputs.step[row, t, group, head]
            written = torch.outer(inputs.b[row, t, group], step * inputs.x[row, t, group, head])
            s = (step * rates[group, head]).exp() * s + written
            near(outputs[row, t, group, head], s.T @ inputs.c[row, t, group], 1e-12)
        near(after[row, group, :, head], s, 1e-12)


def test_float32_blocks_lose_no_digits_behind_a_strong_decay():
    """As differences of running sums the exponents behind a sum of −4000 would be off by 2e-4."""
    exponents = -torch.rand(32, dtype=torch.float64) / 10
    exponents[1] = -4000
    torch.testing.assert_close(decay_between(exponents.float()).double(), decay_between(exponents), atol=0, rtol=2e-6)


@pytest.mark.parametrize("length", [1, 50])
def test_the_choice_between_the_forms_does_not_show(length):
    inputs, rates, state = ssd_inputs(length, 2)
    for block in (8, 256):
        for chosen, plain in zip(ssd(inputs, rates, state, block=block), ssd_scan(inputs, rates, state), strict=True):
            near(chosen, plain, 1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_short_convolution_equals_torch_and_the_shifted_sum(bias, kernel):
    inputs, weight = torch.randn(2, 9 + kernel - 1, 6), torch.randn(6, 1, kernel)
    bias = torch.randn(6) if bias else None
    expected = F.conv1d(inputs.mT, weight, bias, groups=6).mT
    near(shifted_sum(inputs, weight, bias), expected, 1e-6)
    near(short_convolution(inputs, weight, bias), expected, 1e-6)
    near(short_convolution(inputs[:, :kernel], weight, bias), expected[:, :1], 1e-6)


@torch.inference_mode()
def test_state_is_the_last_inputs_of_the_convolution_and_s():
    model, ids = ours(n_groups=2), tokens(2, 7)
    first, inputs = model.backbone.layers[0], []
    first.mixer.in_proj.register_forward_hook(lambda module, args, outputs: inputs.append(outputs[..., 32:88]))
    state = model(ids).state
    recent, s = split_state(state, model.config)
    assert state.shape == (2, 2, layer_state_size(model.config))
    assert recent.shape == (2, 2, 3, 32 + 2 * 2 * 6)
    assert s.shape == (2, 2, 2, 6, 2, 8)
    assert recent.data_ptr() == state.data_ptr()
    assert torch.equal(recent[:, 0], inputs[0][:, -3:])


@torch.inference_mode()
def test_rows_shorter_than_the_kernel_keep_what_the_state_knows():
    """One real token of five: the convolution's memory is two tokens from the state and this one."""
    model, ids = ours(), tokens(2, 5)
    state = model(tokens(2, 4)).state
    mask = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    after = model(ids, attention_mask=mask, state=state).state
    near(after[0], model(ids[:1, 2:3], state=state[:1]).state[0], 1e-6)
    assert torch.equal(after[1], state[1])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_state_is_float32_or_wider(dtype):
    model, ids = ours().to(dtype), tokens(2, 5)
    expected = torch.promote_types(dtype, torch.float32)
    assert model.backbone.initial_state(model.backbone.embeddings(ids)).dtype == expected
    state = model(ids).state
    assert state.dtype == expected
    assert model(ids[:, :1], state=state).state.dtype == expected


@torch.inference_mode()
def test_limits_of_the_step_hold_for_single_tokens_too():
    """transformers' plain form forgets them there."""
    model, ids = ours(time_step_limit=(0.3, 0.9)), tokens(2, 10)
    state, logits = None, []
    for t in range(10):
        outputs = model(ids[:, t : t + 1], state=state)
        state = outputs.state
        logits.append(outputs.logits)
    near(torch.cat(logits, dim=1), model(ids).logits)
    near(state, model(ids).state)


@torch.inference_mode()
def test_chunk_size_changes_nothing():
    model, ids = ours(), tokens(2, 50)
    expected = model(ids)
    for size in (1, 7, 16):
        model.config.chunk_size = size
        near(model(ids).logits, expected.logits)
        near(model(ids).state, expected.state)


@torch.inference_mode()
def test_a_layer_alone_takes_and_gives_its_state():
    mixer = ours().backbone.layers[0].mixer
    hidden = torch.randn(2, 8, 16)
    zero = LayerState(torch.zeros(2, 3, 44), torch.zeros(2, 1, 6, 4, 8))
    expected, final = mixer(hidden, zero)
    first, between = mixer(hidden[:, :2], zero)
    second, after = mixer(hidden[:, 2:], between)
    near(torch.cat([first, second], dim=1), expected, 1e-6)
    near(after.recent, final.recent, 1e-6)
    near(after.s, final.s, 1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_that_transformers_saved_loads_and_goes_back(tmp_path, caplog, tied):
    their = theirs(tie_word_embeddings=tied, time_step_limit=(0.1, 0.9))
    ids = tokens(2, 12)
    their.save_pretrained(tmp_path / "theirs")
    logging.set_verbosity_warning()
    logging.enable_propagation()
    our = ZooMamba2ForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    logging.disable_propagation()
    assert caplog.text == ""  # no word about another `model_type`, missing or unexpected weights
    logging.set_verbosity_error()
    assert type(our.config) is ZooMamba2Config
    assert (our.lm_head.weight is our.backbone.embeddings.weight) == tied
    near(our(ids).logits, their(ids).logits)
    near(ZooMamba2Model.from_pretrained(tmp_path / "theirs").eval()(ids).state, our(ids).state)
    our.save_pretrained(tmp_path / "ours")
    back = Mamba2ForCausalLM.from_pretrained(tmp_path / "ours").eval()
    for name, value in their.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)
    assert torch.equal(back(ids).logits, their(ids).logits)


def test_fields_are_those_of_transformers_and_what_a_saved_folder_leaves_out_too(tmp_path):
    default = Mamba2Config().to_dict()
    assert default.keys() - ZooMamba2Config().to_dict().keys() <= {"rms_norm"}  # of older ones, without effect
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba2", "num_hidden_layers": 3}))
    config = ZooMamba2Config.from_pretrained(tmp_path).to_dict()
    assert config.pop("chunk_length") == 1024
    assert config == default | {"model_type": "zoo_mamba2", "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "zoo_mamba2", "num_hidden_layers": 3}))
    assert ZooMamba2Config.from_pretrained(tmp_path).hidden_size == ZooMamba2Config().hidden_size


def save_as_mamba_ssm(model, folder, **fields):
    """What the package `mamba_ssm` would save of transformers' model."""
    sizes = {"d_model": 16, "n_layer": 2, "vocab_size": 19, "pad_vocab_size_multiple": 1, "tie_embeddings": False}
    options = {"layer": "Mamba2", "headdim": 8, "d_state": 6}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(sizes | {"ssm_cfg": options} | fields))
    weights = {name.replace("embeddings.", "embedding."): value for name, value in model.state_dict().items()}
    torch.save(weights, folder / "pytorch_model.bin")


@torch.inference_mode()
def test_a_folder_of_the_mamba_ssm_package_loads_and_saves_as_ours(tmp_path):
    their, ids = theirs(), tokens(2, 12)
    save_as_mamba_ssm(their, tmp_path / "theirs")
    our = ZooMamba2ForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    near(our(ids).logits, their(ids).logits)
    our.save_pretrained(tmp_path / "ours")
    for kind in (ZooMamba2ForCausalLM, Mamba2ForCausalLM):
        near(kind.from_pretrained(tmp_path / "ours").eval()(ids).logits, their(ids).logits)


def test_defaults_of_the_mamba_ssm_package(tmp_path):
    fields = {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"pad_vocab_size_multiple": 16, "attn_layer_idx": []}))
    config = ZooMamba2Config.from_pretrained(tmp_path)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (768, 24, 50288)
    assert (config.num_heads, config.head_dim, config.state_size, config.n_groups) == (24, 64, 128, 1)
    assert config.tie_word_embeddings
    assert config.eos_token_id is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ssm_cfg": {}}, r"`ssm_cfg\['layer'\]` must be \"Mamba2\""),
        ({"attn_layer_idx": [1]}, "without attention or MLP layers"),
        ({"d_intermediate": 64}, "without attention or MLP layers"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, r"has not: \['D_has_hdim'\]"),
    ],
)
def test_other_models_of_the_mamba_ssm_package_are_refused(tmp_path, fields, message):
    save_as_mamba_ssm(ours(), tmp_path / "theirs", **fields)
    with pytest.raises(ValueError, match=message):
        ZooMamba2ForCausalLM.from_pretrained(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0}, "`hidden_size` must be at least 1, got 0"),
        ({"chunk_length": -1}, "`chunk_length` must be at least 1, got -1"),
        ({"num_heads": 3}, r"`num_heads \* head_dim` must be `expand \* hidden_size`, got 3 \* 32 and 2 \* 64"),
        ({"n_groups": 3}, "`n_groups` must divide `num_heads`, got 3 and 4"),
    ],
)
def test_wrong_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ZooMamba2Config(**fields)
