"""What every recurrent language model of this package keeps to, each against itself by another way."""

import ast
import copy
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_models import SMALL
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers import pipeline as make_pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from zoo_hf import models
from zoo_hf.models.loss import causal_lm_loss


every_model = pytest.mark.parametrize("name", SMALL)
padded_or_not = pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])


@pytest.fixture(autouse=True)
def seeded():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(name, **config):
    """The model with every weight displaced: what starts as zero or one would hide an error behind it."""
    model = SMALL[name](**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(*shape):
    return torch.randint(1, 11, shape)  # without 0, which `generate` takes for padding where it is `pad_token_id`


def masked(rows, length):
    """A mask of `rows` ≥ 3 rows: padded on the left, on the right, in between, and then whole rows."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    mask[1, -(length // 4) :] = 0
    mask[2, [0, 2, 3, -1]] = 0
    return mask


def head_is_embedding(model):
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def near(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@every_model
def test_padding_changes_nothing_for_real_tokens_and_the_state(name):
    model, ids, mask = small(name), tokens(4, 9), masked(4, 9)
    padded = model(ids, attention_mask=mask)
    for row in range(4):
        real = mask[row].bool()
        alone = model(ids[row, real][None])
        near(padded.logits[row, real], alone.logits[0])
        near(padded.state[row], alone.state[0])


@every_model
def test_masked_tokens_are_never_looked_at(name):
    model, ids, mask = small(name), tokens(4, 9), masked(4, 9)
    others = torch.where(mask.bool(), ids, (ids + 1) % 11)
    assert torch.equal(model(ids, attention_mask=mask).state, model(others, attention_mask=mask).state)


@every_model
def test_a_row_of_padding_keeps_its_state(name):
    model, ids = small(name), tokens(2, 5)
    state = model(ids).state
    mask = torch.tensor([[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    outputs = model(ids, attention_mask=mask, state=state)
    near(outputs.state[0], state[0])
    near(outputs.state[1], model(ids, state=state).state[1])
    assert outputs.logits.isfinite().all()


@every_model
def test_mask_of_ones_is_no_mask(name):
    model, ids = small(name), tokens(2, 9)
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)


@every_model
@padded_or_not
def test_stepwise_equals_whole_and_the_state_keeps_its_size(name, padded):
    model, ids = small(name), tokens(3, 12)
    mask = masked(3, 12) if padded else torch.ones(3, 12, dtype=torch.long)
    whole = model(ids, attention_mask=mask)
    state, logits = None, []
    for t in range(12):
        step = model(ids[:, t : t + 1], attention_mask=mask[:, t : t + 1], state=state)
        state = step.state
        logits.append(step.logits)
        assert state.shape == whole.state.shape
    assert len(state) == 3
    near(torch.cat(logits, dim=1)[mask.bool()], whole.logits[mask.bool()])
    near(state, whole.state)


@every_model
@padded_or_not
def test_chunks_equal_the_whole(name, padded):
    """Four tokens at a time and all at once: scores, state, loss, and the loss's gradient."""
    ids = tokens(3, 11)
    mask = masked(3, 11) if padded else None
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    whole = small(name)
    chunked = copy.deepcopy(whole)
    chunked.config.chunk_length = 4
    scored, expected = chunked(ids, attention_mask=mask), whole(ids, attention_mask=mask, labels=labels)
    near(scored.logits[real], expected.logits[real])
    near(scored.state, expected.state)
    outputs = chunked(ids, attention_mask=mask, labels=labels)
    assert outputs.logits is None  # memory must not grow with the context
    assert outputs.loss.dtype == torch.float64
    near(outputs.loss, expected.loss)
    near(outputs.state, expected.state)
    outputs.loss.backward()
    expected.loss.backward()
    for ours, theirs in zip(chunked.parameters(), whole.parameters(), strict=True):
        near(ours.grad, theirs.grad)


@every_model
def test_given_state_and_global_random_numbers_are_left_alone(name):
    model, ids = small(name), tokens(2, 5)
    state = model(ids).state
    before, generator = state.clone(), torch.get_rng_state()
    model(ids, state=state, attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]), labels=ids)
    with torch.inference_mode():
        model(ids, state=state)
        model(ids[:, :1], state=state)
    assert torch.equal(state, before)
    assert torch.equal(torch.get_rng_state(), generator)


@every_model
def test_the_first_token_is_felt_at_the_end_and_the_last_one_nowhere_before(name):
    model, ids = small(name), tokens(1, 8)
    logits = model(ids).logits
    first, last = ids.clone(), ids.clone()
    first[0, 0], last[0, -1] = (ids[0, 0] + 1) % 11, (ids[0, -1] + 1) % 11
    assert (model(first).logits[0, -1] - logits[0, -1]).abs().max() > 1e-5
    assert torch.equal(model(last).logits[0, :-1], logits[0, :-1])


@every_model
def test_cache_and_hidden_states_come_on_request(name):
    model, ids = small(name), tokens(2, 5)
    outputs = model(ids, output_hidden_states=True)
    assert model(ids, use_cache=False).state is None
    assert model(ids).hidden_states is None
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(outputs.hidden_states[0], embeddings)
    assert all(hidden.shape[:2] == (2, 5) for hidden in outputs.hidden_states)
    near(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    near(model(ids, logits_to_keep=2).logits, outputs.logits[:, -2:])
    near(model(ids, logits_to_keep=torch.tensor([3, 0])).logits, outputs.logits[:, [3, 0]])
    assert torch.equal(model(ids, return_dict=False)[0], outputs.logits)
    assert torch.equal(model(inputs_embeds=embeddings).logits, outputs.logits)


@every_model
def test_wrong_calls_are_refused(name):
    model, ids = small(name), tokens(2, 5)
    with pytest.raises(ValueError, match="One of `input_ids` and `inputs_embeds`"):
        model()
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape of the tokens, got \(2, 6\)"):
        model(ids, attention_mask=torch.ones(2, 6))


GENERATION = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
}


@every_model
@pytest.mark.parametrize("how", GENERATION)
def test_generation_is_the_same_with_and_without_cache(name, how):
    model, ids = small(name, pad_token_id=0), tokens(6, 5)
    with torch.no_grad():
        for embedding in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            embedding.mul_(4)  # beams overtake each other, so that their states must move with them
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        texts.append(model.generate(ids, max_new_tokens=12, use_cache=use_cache, **GENERATION[how]))
    assert texts[0].shape == (12 if how == "beams" else 6, 17)
    assert torch.equal(texts[0], texts[1])


@every_model
def test_greedy_generation_appends_the_likeliest_token_of_the_whole_context(name):
    model, ids = small(name), tokens(1, 5)
    text = model.generate(ids, max_new_tokens=6, do_sample=False)
    for length in range(5, 11):
        assert text[0, length] == model(text[:, :length]).logits[0, -1].argmax()


@every_model
def test_generation_reads_the_prompt_once_and_then_token_by_token(name):
    model, widths = small(name), []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    model.generate(tokens(2, 5), max_new_tokens=4, do_sample=False)
    assert widths == [5, 1, 1, 1]


@every_model
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("beams", "chunk_length"), [(1, 1024), (3, 1024), (1, 2)])
def test_padded_batch_generates_what_each_prompt_generates_alone(name, side, beams, chunk_length):
    model = small(name, pad_token_id=0, chunk_length=chunk_length)
    prompts = [tokens(3), tokens(6), tokens(1)]
    padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side=side)
    lengths = [torch.ones(len(prompt), dtype=torch.long) for prompt in prompts]
    mask = nn.utils.rnn.pad_sequence(lengths, batch_first=True, padding_side=side)
    batch = model.generate(padded, attention_mask=mask, max_new_tokens=7, do_sample=False, num_beams=beams)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], max_new_tokens=7, do_sample=False, num_beams=beams)
        assert torch.equal(batch[row, 6:], alone[0, len(prompt) :])


@every_model
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_continues_from_a_given_state(name, use_cache, beams):
    model, ids = small(name, pad_token_id=0), tokens(2, 9)
    state, how = model(ids[:, :5]).state, {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    continued = model.generate(ids[:, 5:], state=state, use_cache=use_cache, **how)
    assert torch.equal(continued[:, 4:], model.generate(ids, **how)[:, 9:])


@every_model
@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_that_start_anew_do_so_once_when_they_generate(name, use_cache):
    model, ids = small(name), tokens(3, 5)
    state = model(tokens(3, 7)).state
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": use_cache}
    expected = model.generate(ids, **arguments)
    starts = torch.ones(3, dtype=torch.bool)
    assert torch.equal(model.generate(ids, state=state, starts=starts, **arguments), expected)


@every_model
def test_a_state_of_another_dtype_is_taken(name):
    model, ids = small(name), tokens(2, 20)
    state = model(tokens(2, 7)).state
    expected = model(ids, state=state).logits
    near(model(ids, state=state.double()).logits, expected)
    near(model(ids, state=state.to(torch.bfloat16)).logits, model(ids, state=state.to(torch.bfloat16).float()).logits)
    assert model.to(torch.bfloat16)(ids, state=state).logits.isfinite().all()


@every_model
def test_text_generation_pipeline(name):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "a": 1, "b": 2, "c": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")
    model = small(name, vocab_size=4, pad_token_id=0)
    generator = make_pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = generator("a b c", max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"]
    ids = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False)
    assert text.split() == tokenizer.decode(ids[0, 3:], skip_special_tokens=True).split()


@every_model
@pytest.mark.parametrize("shard", ["1GB", "1KB"])
def test_saved_model_loads_bit_for_bit(tmp_path, name, shard):
    model = small(name, eos_token_id=3)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "1KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert head_is_embedding(loaded) == head_is_embedding(model)


@every_model
def test_auto_classes_and_the_trainer_know_the_model(name):
    model = small(name)
    kind = model.config.model_type
    assert type(AutoConfig.for_model(kind)) is type(model.config)
    assert type(AutoModel.from_config(model.config)) is type(model.base_model)
    assert type(AutoModelForCausalLM.from_config(model.config)) is type(model)
    assert type(model).__name__.endswith("ForCausalLM")
    # otherwise the Trainer counts the first label of every row too, and its label smoothing shifts no labels
    assert model.loss_type == "ForCausalLM"
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind] == type(model).__name__


@every_model
def test_embedding_and_head_grow_together(name):
    model, ids = small(name), tokens(2, 5)
    before = model(ids).logits
    model.resize_token_embeddings(13, mean_resizing=False)
    assert model(torch.tensor([[12]])).logits.shape == (1, 1, 13)
    near(model(ids).logits[..., :11], before)
    assert head_is_embedding(model) == model.config.tie_word_embeddings


@every_model
def test_loss_is_the_cross_entropy_of_shifted_labels(name):
    model, ids = small(name), tokens(3, 8)
    labels = ids.masked_fill(torch.rand(3, 8) < 0.3, -100)
    outputs = model(ids, labels=labels)
    scores, targets = outputs.logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten()
    near(outputs.loss, F.cross_entropy(scores, targets), 1e-6)
    summed = F.cross_entropy(scores, targets, reduction="sum")
    for count in (40, torch.tensor(40)):
        near(model(ids, labels=labels, num_items_in_batch=count).loss, summed / 40, 1e-6)


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_stays_float64_and_resolves_below_a_float32_step(name, dtype):
    model, ids = small(name, vocab_size=200).to(dtype), torch.randint(200, (3, 50))
    losses = []
    for rows in (2, 3):
        outputs = model(ids[:rows], labels=ids[:rows])
        exact = causal_lm_loss(outputs.logits.double(), ids[:rows])
        assert outputs.loss.dtype == exact.dtype == torch.float64
        assert abs(outputs.loss - exact) < 1e-7  # a float32 loss near 5 moves in steps of 4.8e-7
        losses.append(outputs.loss)
    assert any(loss != loss.float() for loss in losses)  # a mean may be a float32 by chance


@every_model
def test_accumulated_losses_add_up_to_the_loss_of_the_joint_batch(name):
    model, ids = small(name), tokens(4, 6)
    labels = ids.masked_fill(torch.rand(4, 6) < 0.3, -100)
    count = (labels[:, 1:] != -100).sum()
    rows = zip(ids.split(1), labels.split(1), strict=True)
    total = sum(model(row, labels=targets, num_items_in_batch=count).loss for row, targets in rows)
    near(total, model(ids, labels=labels).loss, 1e-6)


@every_model
@padded_or_not
def test_gradient_flows_to_every_parameter_and_predicts_the_loss(name, padded):
    """The derivative along a random direction equals the central difference of the loss, as a probe would take it."""
    model, ids = small(name).double(), tokens(3, 9)
    mask = masked(3, 9) if padded else None

    def loss():
        return model(ids, attention_mask=mask, labels=ids).loss

    loss().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    direction = [torch.randn_like(gradient) for gradient in gradients]
    sides = []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, z in zip(model.parameters(), direction, strict=True):
                parameter.add_(z, alpha=sign * 1e-5)
            sides.append(loss())
    expected = sum((g * z).sum() for g, z in zip(gradients, direction, strict=True))
    near((sides[0] - sides[1]) / 2e-5, expected, 1e-5)


@every_model
@padded_or_not
def test_vmap_over_members_equals_a_loop(name, padded):
    members = [small(name) for _ in range(4)]
    ids = tokens(3, 7)
    mask = masked(3, 7) if padded else None
    parameters, buffers = stack_module_state(members)

    def loss(member, constants):
        arguments = {"input_ids": ids, "attention_mask": mask, "labels": ids}
        return functional_call(members[0], (member, constants), (), arguments).loss

    with torch.inference_mode():
        losses = vmap(loss)(parameters, buffers)
        expected = torch.stack([model(ids, attention_mask=mask, labels=ids).loss for model in members])
    assert losses.dtype == torch.float64
    near(losses, expected, 2e-6)


@every_model
@padded_or_not
def test_bfloat16_weights_and_autocast_stay_near_float32(name, padded):
    model, ids = small(name), tokens(4, 20)
    mask = masked(4, 20) if padded else None
    with torch.inference_mode():
        exact = model(ids, attention_mask=mask, labels=ids)
        carried = model(ids, attention_mask=mask, state=exact.state, labels=ids)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(ids, attention_mask=mask, labels=ids)
            assert abs(model(ids, attention_mask=mask, state=cast.state, labels=ids).loss - carried.loss) < 2e-2
        half = model.to(torch.bfloat16)(ids, attention_mask=mask, labels=ids)
    assert abs(cast.loss - exact.loss) < 2e-2
    assert abs(half.loss - exact.loss) < 2e-2
    assert half.logits.dtype == torch.bfloat16
    assert half.state.isfinite().all()


@every_model
def test_traced_model_has_the_same_loss(name):
    model, ids = small(name), tokens(2, 3)
    with torch.no_grad():
        near(torch.compile(model, backend="eager")(ids, labels=ids).loss, model(ids, labels=ids).loss, 1e-6)


@every_model
# torch 2.13's own inductor still imports a module that uses it
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_compiled_model_has_the_same_loss(name):
    model, ids = small(name), tokens(2, 2)
    with torch.no_grad():
        near(torch.compile(model)(ids, labels=ids).loss, model(ids, labels=ids).loss, 1e-6)


@every_model
def test_every_field_of_the_configuration_is_explained(name):
    config = type(small(name).config)
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = {field.name for field in dataclasses.fields(config)} - inherited
    assert {"vocab_size", "hidden_size", "chunk_length"} <= own
    for field in own:
        assert f"\n        {field} (`" in config.__doc__, f"{config.__name__} does not explain `{field}`"


def relative_imports(path):
    """Names of the modules beside a file that it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}


@pytest.mark.parametrize("path", [*Path(models.__file__).parent.glob("modeling_*.py")], ids=lambda path: path.name)
def test_a_model_names_all_the_code_that_it_needs_elsewhere(path):
    """transformers 5.6 copies the files that this one imports, and not what they import."""
    needed, more = set(), relative_imports(path)
    while more:
        needed |= more
        more = {name for found in more for name in relative_imports(path.with_name(f"{found}.py"))} - needed
    assert relative_imports(path) == needed
