"""ZOOTrainer: a step is the formula, and everything else is as in `transformers.Trainer`."""

import copy
import functools
import logging
import math
import random
import re
import threading

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CHECKPOINTING, VOCABULARY, Estimates, batch, texts, tiny_lstm, weights
from safetensors.torch import load_file
from test_config import OWN
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.training_args import OptimizerNames

from zoo_hf import Direction, ZOOTrainer, entries, gradient
from zoo_hf.noise import dropout_seed
from zoo_hf.procedure import peak_memory


EXACT = {"rtol": 0, "atol": 0}
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}
IN_ORDER = {"train_sampling_strategy": "sequential"}  # float32 sums over a batch depend on its order
ROUNDED_ONCE = {"rtol": 0, "atol": 1e-7}  # float64 losses, and coefficients below 1 in float32
# what float32 rounding of a loss near 4 makes of a coefficient at ε = 1e-2
ROUNDED_LOSSES = {"rtol": 0, "atol": 1e-4}


def tiny_gpt2(dropout=0.0, kind=GPT2LMHeadModel, **config):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return kind(GPT2Config(**(sizes | tokens | drops | config)))


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **sizes))


def tiny_bert(**config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **(sizes | config)))


def member(model, args, direction, sign):
    """A copy of the model at θ + sign · ε z, in inference mode."""
    copied = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            z = entries(direction, name, 0, parameter.numel(), distribution=args.distribution).view_as(parameter)
            parameter += sign * args.smoothing_radius * z
    return copied


@torch.no_grad()
def coefficients_by_hand(model, args, loss, step=0):
    """Coefficients (n,), float64, of `loss(model)` at the weights of `model`."""
    coefficients = []
    for index in range(args.num_directions):
        direction = Direction(args.seed, step, index)
        plus = loss(member(model, args, direction, 1)).double()
        if args.estimator == "central":
            minus = loss(member(model, args, direction, -1)).double()
            coefficients.append((plus - minus) / (2 * args.smoothing_radius))
        else:
            coefficients.append((plus - loss(member(model, args, direction, 0)).double()) / args.smoothing_radius)
    return torch.stack(coefficients)


def mean_loss(inputs):
    """The model's own loss of a batch."""
    return lambda model: model(**inputs).loss


def run(trainer):
    """Train, and return every estimate that the optimizer was given."""
    estimates = Estimates()
    trainer.add_callback(estimates)
    trainer.train()
    return estimates.seen


def logged(trainer, name):
    """A quantity's values, in the order they were logged."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("estimator", ["central", "forward"])
def test_a_step_with_sgd_is_the_formula(trainer, estimator, distribution):
    model, examples = tiny_lstm(), texts(4)
    before = copy.deepcopy(model)
    made = trainer(model, examples, max_steps=1, estimator=estimator, distribution=distribution)
    (estimate,) = run(made)
    coefficients = coefficients_by_hand(before, made.args, mean_loss(batch(examples)))
    torch.testing.assert_close(estimate.coefficients.double(), coefficients, rtol=1e-6, atol=1e-9)
    for name, theta in before.named_parameters():
        z = torch.stack(
            [entries(d, name, 0, theta.numel(), distribution=distribution) for d in estimate.directions]
        )  # (n, numel)
        step = 1e-2 * (coefficients[:, None] * z).mean(dim=0).view_as(theta)
        torch.testing.assert_close(
            model.get_parameter(name).detach(), (theta - step).detach().float(), rtol=0, atol=1e-7
        )


def test_each_step_has_directions_of_its_own(trainer):
    made = trainer(tiny_lstm(), texts(4), max_steps=3)
    directions = [d for estimate in run(made) for d in estimate.directions]
    assert directions == [Direction(42, step, index) for step in range(3) for index in range(4)]


def test_a_run_learns_a_batch_by_heart(trainer):
    model = tiny_lstm()
    made = trainer(model, texts(4), max_steps=60, num_directions=8, optim="adamw_torch", learning_rate=0.1)
    made.train()
    losses = logged(made, "loss")
    assert losses[0] == pytest.approx(math.log(VOCABULARY), abs=0.2)
    assert losses[-1] < 2.0  # 1.53 was seen


def test_the_logged_loss_is_the_mean_over_members_and_steps(trainer):
    made = trainer(tiny_lstm(), texts(4), max_steps=4, logging_steps=2)
    means = [estimate.loss for estimate in run(made)]
    assert logged(made, "loss") == pytest.approx([sum(means[:2]) / 2, sum(means[2:]) / 2], rel=1e-6)


@pytest.mark.parametrize("model", [tiny_gpt2, tiny_llama])
def test_models_of_transformers_have_the_coefficients_of_the_formula(trainer, model):
    model, examples = model(), texts(4)
    before = copy.deepcopy(model)
    made = trainer(model, examples, max_steps=1, **IN_ORDER)
    (estimate,) = run(made)
    items = torch.tensor(4 * 7)  # the Trainer counts labels, of which the first of a sentence is no target
    if isinstance(model, GPT2LMHeadModel):
        items = torch.tensor(4 * 8)  # but not for this class, whose loss it does not recognise
    coefficients = coefficients_by_hand(
        before, made.args, lambda model: model(**batch(examples), num_items_in_batch=items).loss
    )
    torch.testing.assert_close(estimate.coefficients, coefficients.float(), **EXACT)


class Quadratic(nn.Module):
    """A model that is not of transformers: L = mean (w·x − y)²."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 1)

    def forward(self, x, labels):
        predicted = self.linear(x).squeeze(-1)
        return {"loss": F.mse_loss(predicted, labels), "predicted": predicted}


def points(count):
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    return [{"x": row, "labels": row.sum()} for row in x]


def test_a_module_that_is_not_of_transformers_is_trained_and_evaluated(trainer):
    model, examples = Quadratic(), points(8)
    before = model(**batch(examples))["loss"].item()
    made = trainer(model, examples, {"eval_dataset": examples}, max_steps=100, learning_rate=3e-2, num_directions=8)
    made.train()
    metrics = made.evaluate()
    assert metrics["eval_loss"] == pytest.approx(model(**batch(examples))["loss"].item(), rel=1e-6)
    assert metrics["eval_loss"] < 0.05 * before


def test_tied_weights_are_displaced_and_saved_once_and_stay_tied(trainer, tmp_path):
    model, examples = tiny_lstm(embedding_size=16, tie_word_embeddings=True), texts(4)
    before = copy.deepcopy(model)
    made = trainer(model, examples, max_steps=1)
    (estimate,) = run(made)
    torch.testing.assert_close(
        estimate.coefficients, coefficients_by_hand(before, made.args, mean_loss(batch(examples))).float(), **EXACT
    )
    assert [name for name in made.update.parameters if "lm_head.weight" in name] == []
    assert model.lm_head.weight is model.model.embed_tokens.weight
    made.save_model()
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(weights(loaded), weights(model), **EXACT)


def test_frozen_weights_stay_even_in_an_optimizer_that_holds_them(trainer):
    model = tiny_lstm()
    model.model.embed_tokens.requires_grad_(False)
    before = weights(model)
    made = trainer(model, texts(4), {"optimizers": (torch.optim.SGD(model.parameters(), lr=1e-2), None)})
    made.train()
    changed = {name for name, value in weights(model).items() if not value.equal(before[name])}
    assert changed == before.keys() - {"model.embed_tokens.weight"}


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: MeanLoss(model)], ids=["summed", "mean"])
def test_a_step_outside_of_train_is_an_update_of_one_micro_batch(trainer, wrap):
    model, inputs = wrap(tiny_lstm()), batch(texts(4))
    before = copy.deepcopy(model)
    made = trainer(model, texts(4), gradient_accumulation_steps=8)
    loss = made.training_step(model, inputs)
    coefficients = coefficients_by_hand(before, made.args, lambda model: model(**inputs)["loss"]).float()
    torch.testing.assert_close(made.update.estimate.coefficients, coefficients, **EXACT)
    assert loss.item() == pytest.approx(made.update.estimate.loss)
    made.optimizer.step()
    changed = [not value.equal(dict(before.named_parameters())[name]) for name, value in weights(model).items()]
    assert all(changed)


@pytest.mark.parametrize("dropout", [False, True])
def test_global_generators_are_untouched_by_a_step(trainer, dropout):
    states = []

    class States(TrainerCallback):
        def record(self, *args, **kwargs):
            states.append((torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()))

        on_step_begin = on_step_end = record

    made = trainer(tiny_gpt2(dropout=0.5), texts(8), dropout=dropout, gradient_accumulation_steps=2)
    made.add_callback(States())
    made.train()
    assert len(states) == 4
    assert states[0] == states[1]
    assert states[2] == states[3]


def test_with_dropout_all_members_see_the_masks_of_the_step(trainer):
    model, examples = tiny_gpt2(dropout=0.5), texts(4)
    before = copy.deepcopy(model)
    made = trainer(model, examples, max_steps=1, dropout=True, **IN_ORDER)
    (estimate,) = run(made)

    def loss(model):
        with torch.random.fork_rng():
            torch.manual_seed(dropout_seed(made.args.seed, 0, 0))
            return model.train()(**batch(examples), num_items_in_batch=torch.tensor(32)).loss

    coefficients = coefficients_by_hand(before, made.args, loss).float()
    torch.testing.assert_close(estimate.coefficients, coefficients, **EXACT)


def test_each_micro_batch_has_masks_of_its_own_in_every_step(trainer):
    model, rows = tiny_gpt2(dropout=0.5), texts(4)
    before = copy.deepcopy(model)
    accumulated = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.0}
    made = trainer(model, rows, max_steps=2, dropout=True, **accumulated, **IN_ORDER)
    estimates = run(made)

    def loss(model, step):
        losses = []
        for number in range(2):
            with torch.random.fork_rng():
                torch.manual_seed(dropout_seed(made.args.seed, step, number))
                inputs = batch(rows[2 * number : 2 * number + 2])
                losses.append(model.train()(**inputs, num_items_in_batch=torch.tensor(32)).loss)
        return losses[0].double() + losses[1].double()

    for step, estimate in enumerate(estimates):
        coefficients = coefficients_by_hand(before, made.args, functools.partial(loss, step=step), step=step)
        torch.testing.assert_close(estimate.coefficients, coefficients.float(), **EXACT)


def test_without_dropout_a_probe_is_inference(trainer):
    examples, seen = texts(4), []
    for dropout in (0.0, 0.5):
        made = trainer(tiny_gpt2(dropout=dropout), examples, max_steps=1)
        seen.append(run(made)[0].coefficients)
    torch.testing.assert_close(*seen, **EXACT)


class Noisy(nn.Module):
    """Its outermost module drops out by itself."""

    def __init__(self, p):
        super().__init__()
        self.quadratic, self.p = Quadratic(), p

    def forward(self, x, labels):
        return self.quadratic(F.dropout(x, self.p, training=self.training), labels)


@pytest.mark.parametrize("arguments", [{}, COMPILED], ids=["eager", "compiled"])
def test_without_dropout_a_probe_is_inference_for_the_outermost_module_too(trainer, arguments):
    seen = []
    for p in (0.0, 0.5):
        made = trainer(
            Noisy(p), points(4), {"eval_dataset": points(4)}, eval_strategy="steps", eval_steps=1, **arguments
        )
        seen.append(torch.stack([estimate.coefficients for estimate in run(made)]))
    torch.testing.assert_close(*seen, **EXACT)


@pytest.mark.parametrize("dropout", [False, True])
def test_a_run_leaves_the_modes_that_the_stock_trainer_leaves(config, dropout):
    flags = []
    for kind, arguments in ((Trainer, {"kind": TrainingArguments}), (ZOOTrainer, {"dropout": dropout})):
        model = tiny_gpt2(dropout=0.5).eval()
        seen = []

        class Modes(TrainerCallback):
            def record(self, args, state, control, model, seen=seen, **kwargs):
                seen.append({name: module.training for name, module in model.named_modules()})

            on_step_end = on_log = on_evaluate = on_train_end = record

        args = config(**arguments, eval_strategy="steps", eval_steps=1)
        kind(model, args, train_dataset=texts(4), eval_dataset=texts(4), callbacks=[Modes()]).train()
        flags.append(seen)
    assert flags[0] == flags[1]
    assert {tuple(set(modes.values())) for modes in flags[1]} == {(True,), (False,)}


def test_callbacks_see_neither_displaced_weights_nor_gradients(trainer):
    model, seen, gradients = tiny_lstm(), [], []

    class Watch(TrainerCallback):
        def look(self, args, state, control, model, **kwargs):
            seen.append(weights(model))
            gradients.extend(parameter.grad for parameter in model.parameters())

        on_step_begin = on_substep_end = on_pre_optimizer_step = on_optimizer_step = on_step_end = on_log = look

    made = trainer(model, texts(8), {"callbacks": [Watch()]}, gradient_accumulation_steps=2, max_steps=2)
    start = weights(model)
    made.train()
    end = weights(model)
    assert len(seen) == 2 * 6 + 1  # of each step begin, substep, before and after the update, end and log; last log
    torch.testing.assert_close(seen[:3], [start] * 3, **EXACT)
    torch.testing.assert_close(seen[3:9], [seen[3]] * 6, **EXACT)
    torch.testing.assert_close(seen[9:], [end] * 4, **EXACT)
    assert set(gradients) == {None}


def test_an_objective_that_raises_leaves_the_weights_bit_for_bit(trainer):
    model, calls = tiny_lstm(), []
    before = weights(model)

    def loss(outputs, labels, num_items_in_batch=None):
        calls.append(weights(model))
        if len(calls) == 4:
            raise RuntimeError("no more")
        return outputs.logits.sum()

    made = trainer(model, texts(4), {"compute_loss_func": loss})
    with pytest.raises(RuntimeError, match="no more"):
        made.train()
    assert not any(seen["lm_head.bias"].equal(before["lm_head.bias"]) for seen in calls)
    torch.testing.assert_close(weights(model), before, **EXACT)


class Cliff(nn.Module):
    """L = Σ w, and NaN where Σ w > 4 ε: of five signs, only the direction with all of them alike goes there."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(5))

    def forward(self, x, labels):
        total = self.w.sum()
        return {"loss": total.where(total < 4e-2, torch.nan)}


def test_a_pair_with_a_loss_that_is_nan_is_left_out_and_counted(trainer):
    model = Cliff()
    made = trainer(model, points(4), max_steps=1, num_directions=64)
    (estimate,) = run(made)
    z = torch.stack([entries(Direction(42, 0, i), "w", 0, 5) for i in range(64)])  # (64, 5)
    used = z.sum(dim=1).abs() < 5
    assert 0 < (~used).sum() < 8
    assert estimate.coefficients.isnan().equal(~used)
    assert logged(made, "left_out") == [(~used).sum().item() / 64]
    expected = -1e-2 * (z[used].sum(dim=1, keepdim=True) * z[used]).mean(dim=0)
    torch.testing.assert_close(model.w.detach(), expected, rtol=1e-5, atol=1e-7)
    assert logged(made, "coefficient_spread") == pytest.approx([z[used].sum(dim=1).std(correction=0).item()], rel=1e-5)


def test_a_loss_that_is_always_nan_stops_the_run_with_the_weights_untouched(trainer):
    model = tiny_lstm()
    before = weights(model)
    made = trainer(
        model, texts(4), {"compute_loss_func": lambda outputs, *args, **kwargs: outputs.logits.sum() * math.nan}
    )
    with pytest.raises(FloatingPointError, match="Step 0: 4 of 4 pairs"):
        made.train()
    torch.testing.assert_close(weights(model), before, **EXACT)


def tokenizer():
    words = {"<pad>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "<pad>")), pad_token="<pad>")


@pytest.mark.parametrize(
    "collator",
    [lambda: DataCollatorForSeq2Seq(tokenizer()), lambda: DataCollatorForLanguageModeling(tokenizer(), mlm=False)],
    ids=["padding", "language-modelling"],
)
def test_padding_counts_for_nothing(trainer, collator):
    sentences = [
        text["input_ids"][:length].clamp(min=1).tolist() for text, length in zip(texts(4), (3, 8, 5, 2), strict=True)
    ]
    model = tiny_lstm()
    before = copy.deepcopy(model)
    examples = [{"input_ids": sentence, "labels": sentence} for sentence in sentences]
    if isinstance(collator(), DataCollatorForLanguageModeling):
        examples = [{"input_ids": sentence} for sentence in sentences]
    made = trainer(model, examples, {"data_collator": collator()}, max_steps=1)
    (estimate,) = run(made)

    def loss(model):
        rows = [torch.tensor(sentence)[None] for sentence in sentences]
        total = sum(model(input_ids=row, labels=row).loss * (row.shape[1] - 1) for row in rows)
        return total / sum(row.shape[1] - 1 for row in rows)

    coefficients = coefficients_by_hand(before, made.args, loss).float()
    torch.testing.assert_close(estimate.coefficients, coefficients, **ROUNDED_LOSSES)


def smoothed(logits, labels, factor):
    """(1 − factor) · negative log-probability of the next token + factor · its mean over all tokens, by hand."""
    scores = logits[:, :-1].log_softmax(dim=-1)
    right = -scores.gather(-1, labels[:, 1:, None]).mean()
    return (1 - factor) * right - factor * scores.mean()


@pytest.mark.parametrize("model", [tiny_lstm, tiny_gpt2, tiny_llama])
def test_label_smoothing_is_that_of_the_formula(trainer, model):
    model, examples = model(), texts(4)
    before = copy.deepcopy(model)
    made = trainer(model, examples, max_steps=1, label_smoothing_factor=0.2)
    (estimate,) = run(made)
    inputs = batch(examples)
    # the Trainer divides by all labels, also by the first of a sentence, for classes whose loss it does not recognise
    share = 7 / 8 if isinstance(model, GPT2LMHeadModel) else 1
    coefficients = coefficients_by_hand(
        before,
        made.args,
        lambda model: share * smoothed(model(input_ids=inputs["input_ids"]).logits, inputs["labels"], 0.2),
    )
    torch.testing.assert_close(estimate.coefficients, coefficients.float(), **ROUNDED_LOSSES)


def test_compute_loss_func_is_the_objective(trainer):
    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.square().sum() / num_items_in_batch + 0.1 * labels.float().mean()

    model, examples = tiny_lstm(), texts(4)
    before = copy.deepcopy(model)
    made = trainer(model, examples, {"compute_loss_func": loss}, max_steps=1)
    (estimate,) = run(made)
    inputs = batch(examples)
    coefficients = coefficients_by_hand(
        before, made.args, lambda model: loss(model(input_ids=inputs["input_ids"]), inputs["labels"], torch.tensor(28))
    )
    torch.testing.assert_close(estimate.coefficients, coefficients.float(), **EXACT)


@pytest.mark.parametrize(
    ("sizes", "labels"),
    [
        ({"num_labels": 2}, torch.tensor([0, 1, 1, 0])),
        ({"num_labels": 1, "problem_type": "regression"}, torch.tensor([0.5, -1.0, 2.0, 0.0])),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.eye(4, 3)),
    ],
    ids=["classes", "regression", "several-labels"],
)
def test_sequence_classification_has_the_coefficients_of_its_loss(trainer, sizes, labels):
    model = tiny_bert(**sizes)
    examples = [{"input_ids": t["input_ids"], "labels": label} for t, label in zip(texts(4), labels, strict=True)]
    before = copy.deepcopy(model)
    made = trainer(model, examples, max_steps=1)
    (estimate,) = run(made)
    by_hand = {
        "regression": lambda logits: F.mse_loss(logits.squeeze(), labels),
        "multi_label_classification": lambda logits: F.binary_cross_entropy_with_logits(logits, labels),
        None: lambda logits: F.cross_entropy(logits, labels),
    }[sizes.get("problem_type")]
    inputs = batch(examples)["input_ids"]
    coefficients = coefficients_by_hand(before, made.args, lambda model: by_hand(model(input_ids=inputs).logits))
    torch.testing.assert_close(estimate.coefficients, coefficients.float(), **ROUNDED_LOSSES)


def test_bfloat16_autocast_computes_the_losses_of_the_displaced_weights(trainer):
    model, examples = tiny_gpt2(), texts(4)
    before = copy.deepcopy(model)
    made = trainer(model, examples, max_steps=1, bf16=True, **IN_ORDER)
    (estimate,) = run(made)

    def loss(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch(examples), num_items_in_batch=torch.tensor(32)).loss

    coefficients = coefficients_by_hand(before, made.args, loss).float()
    torch.testing.assert_close(estimate.coefficients, coefficients, **EXACT)
    exact = coefficients_by_hand(before, made.args, lambda m: m(**batch(examples), num_items_in_batch=32).loss).float()
    assert not estimate.coefficients.equal(exact)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


class MeanLoss(nn.Module):
    """A model of transformers' kind whose loss is a mean that knows nothing of other micro-batches."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, labels):
        return {"loss": self.inner(input_ids=input_ids, labels=labels).loss}


def squared(outputs, labels, num_items_in_batch=None):
    return outputs.logits.square().sum() / num_items_in_batch


@pytest.mark.parametrize(
    ("wrap", "keywords", "arguments", "tolerance"),
    [
        (lambda model: model, {}, {}, ROUNDED_ONCE),
        (MeanLoss, {}, {}, ROUNDED_ONCE),
        (lambda model: model, {"compute_loss_func": squared}, {}, ROUNDED_ONCE),
        # transformers sums smoothed losses in float32
        (lambda model: model, {}, {"label_smoothing_factor": 0.1}, ROUNDED_LOSSES),
    ],
    ids=["summed", "mean-of-means", "compute-loss-func", "label-smoothing"],
)
def test_eight_batches_of_one_equal_one_of_eight(trainer, wrap, keywords, arguments, tolerance):
    models, estimates = [], []
    for size, accumulated in ((8, 1), (1, 8)):
        model = wrap(tiny_lstm().double())
        made = trainer(
            model,
            texts(16),
            keywords,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            **IN_ORDER,
            **arguments,
        )
        estimates.append(torch.stack([estimate.coefficients for estimate in run(made)]))
        models.append(weights(model))
        assert made.update.forward_passes == 2 * accumulated * 8
    torch.testing.assert_close(*estimates, **tolerance)
    torch.testing.assert_close(*models, rtol=0, atol=2 * 1e-2 * tolerance["atol"])  # two steps of 1e-2 · ĝ


@pytest.mark.parametrize("wrap", [lambda model: model, MeanLoss], ids=["summed", "mean-of-means"])
def test_the_last_window_of_an_epoch_may_be_shorter(trainer, wrap):
    models = []
    for size, accumulated in ((4, 1), (1, 4)):
        model = wrap(tiny_lstm().double())
        made = trainer(
            model,
            texts(10),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            max_steps=-1,
            num_train_epochs=2,
            **IN_ORDER,
        )
        made.train()
        models.append(weights(model))
        assert made.state.global_step == 6
    torch.testing.assert_close(*models, rtol=1e-9, atol=1e-9)


LAYERWISE = {name for name in OptimizerNames if "layerwise" in name.value}
BACKWARD_ONLY = LAYERWISE | {OptimizerNames.LOMO, OptimizerNames.ADALOMO}
# with arguments of their own, or with none that a tiny model could use
LOW_RANK = {"optim_target_modules": "all-linear", "optim_args": "rank=4"}
OPTIMIZER_ARGUMENTS = {name: LOW_RANK for name in OptimizerNames if name.value.startswith(("galore", "apollo"))}


# need packages that the tests do not, some of them for other devices
NEED_A_PACKAGE = {
    "adamw_apex_fused",
    "adamw_anyprecision",
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "adamw_torch_npu_fused",
    "adamw_torch_xla",
    "apollo_adamw",
    "galore_adafactor",
    "galore_adamw",
    "galore_adamw_8bit",
    "grokadamw",
    "stable_adamw",
}


def dense(optimizer, model, estimates, max_norm=math.inf):
    """Give each estimate's whole gradient to a stock optimizer; returns the norms before clipping."""
    norms = []
    for estimate in estimates:
        for name, parameter in model.named_parameters():
            parameter.grad = gradient(estimate, name, parameter)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
    return norms


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")  # bitsandbytes
@pytest.mark.parametrize("name", list(OptimizerNames), ids=lambda name: name.value)
def test_every_optimizer_equals_itself_on_the_dense_gradient(config, name):
    model, reference = tiny_lstm(), tiny_lstm()
    steps = 8 if name is OptimizerNames.SCHEDULE_FREE_RADAM else 3  # whose first five steps are of length zero
    args = config(optim=name, max_steps=steps, weight_decay=0.1, **OPTIMIZER_ARGUMENTS.get(name, {}))
    if name in BACKWARD_ONLY:
        with pytest.raises(ValueError, match="it updates the weights during a backward pass"):
            ZOOTrainer(model, args)
        return
    try:
        stock = Trainer(reference, args)
        stock.create_optimizer()
    except (ImportError, ValueError) as missing:  # transformers' own message about the package
        assert name.value in NEED_A_PACKAGE
        with pytest.raises(type(missing), match=re.escape(str(missing))):
            ZOOTrainer(model, args, train_dataset=texts(4)).train()
        return
    made = ZOOTrainer(model, args, train_dataset=texts(4))
    estimates = run(made)
    if "schedule_free" in name.value:  # which keeps two points; both trainers are compared at the first
        stock.optimizer.train()
        made.optimizer.train()
    dense(stock.optimizer, reference, estimates)
    torch.testing.assert_close(weights(model), weights(reference), **EXACT)
    assert len(estimates) == steps
    assert not model.lm_head.weight.equal(tiny_lstm().lm_head.weight)


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (lambda parameters: torch.optim.LBFGS(parameters), "LBFGS .* it evaluates the loss again within a step"),
        (lambda parameters: torch.optim.SparseAdam(parameters), "SparseAdam .* it wants sparse gradients"),
    ],
    ids=["lbfgs", "sparse"],
)
def test_an_optimizer_that_needs_more_than_gradients_is_refused(trainer, optimizer, reason):
    model = tiny_lstm()
    with pytest.raises(ValueError, match=reason):
        trainer(model, texts(4), {"optimizers": (optimizer(list(model.parameters())), None)})


def test_muon_takes_the_matrices_of_a_model(trainer):
    def make(model):
        matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
        return torch.optim.Muon(matrices, lr=1e-2)

    model, reference = tiny_lstm(), tiny_lstm()
    made = trainer(model, texts(4), {"optimizers": (make(model), None)}, max_steps=3)
    dense(make(reference), reference, run(made))
    torch.testing.assert_close(weights(model), weights(reference), **EXACT)
    assert not model.lm_head.weight.equal(tiny_lstm().lm_head.weight)
    assert model.lm_head.bias.equal(tiny_lstm().lm_head.bias)


@pytest.mark.parametrize("max_norm", [0.5, 1e3], ids=["clipped", "too-short-to-clip"])
def test_max_grad_norm_clips_as_torch_does_and_logs_the_norm(trainer, max_norm):
    model, reference = tiny_lstm(), tiny_lstm()
    made = trainer(model, texts(4), max_grad_norm=max_norm, max_steps=3)
    norms = dense(torch.optim.SGD(reference.parameters(), lr=1e-2), reference, run(made), max_norm)
    assert logged(made, "grad_norm") == pytest.approx(norms, rel=1e-6)
    torch.testing.assert_close(weights(model), weights(reference), rtol=1e-6, atol=1e-9)
    assert min(norms) > 1.0


@pytest.mark.parametrize("kind", [None, TrainingArguments], ids=["ours", "plain"])
def test_a_norm_that_is_not_computed_is_not_logged(config, kind):
    args = config(**({} if kind is None else {"kind": kind}))
    made = ZOOTrainer(tiny_lstm(), args, train_dataset=texts(4))
    args.num_directions = 4
    made.train()
    assert logged(made, "grad_norm") == []
    assert len(logged(made, "loss")) == 2


@pytest.mark.parametrize(
    "arguments",
    [{"lr_scheduler_type": "linear"}, {"lr_scheduler_type": "cosine", "warmup_steps": 3}, {"warmup_steps": 0.5}],
    ids=["linear", "cosine with warm-up", "half warm-up"],
)
def test_learning_rates_are_those_of_the_stock_trainer(config, arguments):
    args = config(max_steps=8, num_directions=1, **arguments)
    rates = []
    for kind in (Trainer, ZOOTrainer):
        made = kind(tiny_lstm(), args, train_dataset=texts(4))
        made.train()
        rates.append(logged(made, "learning_rate"))
    assert rates[0] == rates[1]
    assert len(rates[0]) == 8


@pytest.mark.parametrize(("limits", "steps"), [({"max_steps": 5}, 5), ({"max_steps": -1, "num_train_epochs": 3}, 6)])
def test_a_run_is_as_long_as_asked(trainer, limits, steps):
    made = trainer(tiny_lstm(), texts(8), num_directions=1, **limits)
    assert len(run(made)) == made.state.global_step == steps
    assert made.update.forward_passes == 2 * steps


@pytest.mark.parametrize(("estimator", "passes"), [("central", 8), ("forward", 5)])
def test_forward_passes_are_counted(trainer, estimator, passes):
    made = trainer(tiny_lstm(), texts(8), estimator=estimator, gradient_accumulation_steps=2, max_steps=3)
    made.train()
    assert logged(made, "forward_passes") == [2 * passes, 4 * passes, 6 * passes, 6 * passes]  # last: of the whole run


def test_training_entries_have_these_keys(trainer):
    made = trainer(tiny_lstm(), texts(8), max_steps=1)
    made.train()
    ours = {
        "forward_passes",
        "tokens",
        "forward_passes_per_second",
        "coefficient_spread",
        "left_out",
        "signal_to_noise",
        "seconds",
    }
    assert made.state.log_history[0].keys() == {"loss", "learning_rate", "epoch", "step"} | ours


@pytest.mark.parametrize("size", [1, 2])
def test_tokens_are_those_of_the_batches_each_counted_once_and_go_on_after_a_restart(trainer, tmp_path, size):
    arguments = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": size}
    made = trainer(tiny_lstm(), texts(16, length=6), max_steps=2, **arguments)
    made.train()
    assert logged(made, "tokens")[:-1] == [24 * size, 48 * size]
    again = trainer(tiny_lstm(), texts(16, length=6), max_steps=4, **arguments)
    again.train(resume_from_checkpoint=True)
    assert logged(again, "tokens")[:-1] == [24 * size * step for step in (1, 2, 3, 4)]


def test_the_last_entry_has_the_memory_that_the_process_has_held_at_most(trainer):
    made = trainer(tiny_lstm(), texts(4))
    before = peak_memory()
    made.train()
    (peak,) = logged(made, "peak_memory_bytes")
    assert before <= peak <= peak_memory()
    held = torch.ones(peak // 4)  # as much again as ever before, all of it written
    assert peak_memory() > peak + held.nbytes // 4


def test_figures_are_those_of_the_steps_since_the_last_entry(trainer):
    made = trainer(tiny_lstm(), texts(4), max_steps=5, logging_steps=2)
    seen = [estimate.coefficients for estimate in run(made)]
    spreads = [torch.cat(part).std(correction=0).item() for part in (seen[:2], seen[2:4])]
    assert logged(made, "coefficient_spread") == pytest.approx(spreads, rel=1e-6)
    assert logged(made, "left_out") == [0.0, 0.0]
    assert logged(made, "forward_passes") == [16, 32, 40]
    again = torch.cat([estimate.coefficients for estimate in run(made)][:2])  # without the unlogged fifth of before
    assert logged(made, "coefficient_spread")[0] == pytest.approx(again.std(correction=0).item(), rel=1e-6)


def test_the_speed_leaves_out_evaluations_and_what_came_before(trainer, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("zoo_hf.trainer.time.perf_counter", lambda: next(clock))
    made = trainer(
        tiny_lstm(), texts(4), {"eval_dataset": texts(4)}, max_steps=4, logging_steps=2, eval_strategy="steps"
    )
    made.train()
    made.args.max_steps = 8
    made.train()
    assert logged(made, "forward_passes_per_second") == [8.0] * 4  # of a clock that a step moves by one second


def test_evaluate_returns_the_epoch_and_logs_the_forward_passes(trainer):
    made = trainer(tiny_lstm(), texts(4), {"eval_dataset": texts(4)})
    made.train()
    metrics = made.evaluate()
    assert metrics["epoch"] == 2.0
    assert "forward_passes" not in metrics
    assert made.state.log_history[-1]["forward_passes"] == 16


def test_tensorboard_gets_the_figures(trainer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = trainer(tiny_lstm(), texts(4), report_to="tensorboard", max_steps=3)
    made.train()
    (file,) = tmp_path.glob("runs/*/events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    for name in ("loss", "coefficient_spread", "left_out", "forward_passes_per_second"):
        values = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert values == [(step, pytest.approx(value)) for step, value in enumerate(logged(made, name), start=1)]
    assert [event.value for event in events.Scalars("train/forward_passes")] == [8, 16, 24, 24]


def test_trackio_gets_the_figures(trainer):
    import trackio.sqlite_storage as storage

    threads = threading.active_count()
    made = trainer(tiny_lstm(), texts(4), report_to="trackio", project="tests", run_name="this", max_steps=3)
    made.train()
    assert threading.active_count() == threads  # no server stays behind
    rows = storage.SQLiteStorage.get_logs("tests", "this")
    steps = [row for row in rows if "train/loss" in row]
    for name in ("loss", "coefficient_spread", "left_out", "forward_passes_per_second"):
        assert [row[f"train/{name}"] for row in steps] == logged(made, name)
    assert [row["train/forward_passes"] for row in steps] == [8, 16, 24]


def test_evaluation_computes_metrics_of_preprocessed_logits(trainer):
    model, held_out = tiny_lstm(), texts(6)[4:]
    shapes = []

    def accuracy(prediction):
        shapes.append(prediction.predictions.shape)
        return {"accuracy": (prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]).mean().item()}

    made = trainer(
        model,
        texts(4),
        {
            "eval_dataset": held_out,
            "compute_metrics": accuracy,
            "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(dim=-1),
        },
        eval_strategy="steps",
        eval_steps=1,
    )
    made.train()
    inputs = batch(held_out)
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    right = (outputs.logits[:, :-1].argmax(dim=-1) == inputs["labels"][:, 1:]).float().mean().item()
    assert logged(made, "eval_accuracy")[-1] == pytest.approx(right)
    assert logged(made, "eval_loss")[-1] == pytest.approx(outputs.loss.item(), rel=1e-6)
    assert len(logged(made, "eval_loss")) == 2
    assert set(shapes) == {(2, 8)}


def test_predict_returns_the_logits_of_the_trained_model(trainer):
    model, held_out = tiny_lstm(), texts(6)[4:]
    made = trainer(model, texts(4))
    made.train()
    prediction = made.predict(held_out)
    with torch.no_grad():
        outputs = model.eval()(**batch(held_out))
    torch.testing.assert_close(torch.from_numpy(prediction.predictions), outputs.logits, **EXACT)
    assert prediction.metrics["test_loss"] == pytest.approx(outputs.loss.item(), rel=1e-6)


def test_early_stopping_ends_with_the_best_of_two_kept_checkpoints(trainer, tmp_path):
    model, scores, at = tiny_lstm(), iter((1.0, 3.0, 2.0, 0.0)), []

    def score(prediction):
        at.append(weights(model))
        return {"score": next(scores)}

    made = trainer(
        model,
        texts(4),
        {"eval_dataset": texts(4), "compute_metrics": score, "callbacks": [EarlyStoppingCallback(2)]},
        max_steps=10,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    made.train()
    assert made.state.global_step == 4
    assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    torch.testing.assert_close(weights(model), at[1], **EXACT)
    assert not at[1]["lm_head.weight"].equal(at[3]["lm_head.weight"])


def test_the_best_strategy_saves_where_the_metric_improves(trainer, tmp_path):
    model, scores, at = tiny_lstm(), iter((1.0, 3.0, 2.0, 4.0)), []

    def score(prediction):
        at.append(weights(model))
        return {"score": next(scores)}

    trainer(
        model,
        texts(4),
        {"eval_dataset": texts(4), "compute_metrics": score},
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model="score",
        greater_is_better=True,
    ).train()
    saved = {path.parent.name: load_file(path) for path in tmp_path.glob("checkpoint-*/model.safetensors")}
    assert saved.keys() == {"checkpoint-1", "checkpoint-2", "checkpoint-4"}
    for name, tensors in saved.items():
        torch.testing.assert_close(tensors, at[int(name[-1]) - 1], **EXACT)


def test_several_evaluation_sets_are_each_evaluated_and_logged(trainer):
    model, sets = tiny_lstm(), {"first": texts(4), "second": texts(6)[4:]}
    made = trainer(model, texts(4), {"eval_dataset": sets}, eval_strategy="steps", eval_steps=2)
    made.train()
    metrics = made.evaluate()
    for name, examples in sets.items():
        with torch.no_grad():
            expected = model.eval()(**batch(examples)).loss.item()
        assert logged(made, f"eval_{name}_loss") == pytest.approx([expected, expected], rel=1e-6)
        assert metrics[f"eval_{name}_loss"] == pytest.approx(expected, rel=1e-6)
    evaluations = [
        entry for entry in made.state.log_history if "eval_first_loss" in entry or "eval_second_loss" in entry
    ]
    assert [entry["forward_passes"] for entry in evaluations] == [16] * 4
    assert "forward_passes" not in metrics


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"save_strategy": "no"}, []),
        ({"save_strategy": "steps", "save_steps": 2}, [2, 4]),
        ({"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}, [2, 4]),
    ],
    ids=["no", "steps", "epoch"],
)
def test_checkpoints_hold_the_weights_of_their_step(trainer, tmp_path, arguments, steps):
    model, at = tiny_lstm(), {}

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            at[state.global_step] = weights(model)

    trainer(model, texts(8), {"callbacks": [Record()]}, **({"max_steps": 4} | arguments)).train()
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")) == steps
    for step in steps:
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        torch.testing.assert_close(saved, at[step], **EXACT)


def test_a_search_tries_our_fields_and_minimises_the_loss(config):
    tried, losses = [], []

    class Record(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            losses.append(metrics["eval_loss"])

        def on_train_end(self, args, state, control, **kwargs):
            passes = [entry["forward_passes"] for entry in state.log_history]
            tried.append((args.smoothing_radius, args.num_directions, passes[-1]))

    def space(trial):
        return {"smoothing_radius": (1e-3, 1e-1)[trial.number], "num_directions": (2, 6)[trial.number]}

    made = ZOOTrainer(
        args=config(eval_strategy="steps", eval_steps=2),
        model_init=lambda: tiny_lstm(),
        train_dataset=texts(4),
        eval_dataset=texts(4),
        callbacks=[Record()],
    )
    best = made.hyperparameter_search(hp_space=space, n_trials=2, backend="optuna")
    assert tried == [(1e-3, 2, 8), (1e-1, 6, 24)]
    assert best.objective == min(losses)


def test_each_model_of_model_init_is_prepared(config):
    made = ZOOTrainer(args=config(), model_init=lambda: tiny_lstm(), train_dataset=texts(4))
    first = made.model
    made.train()
    assert made.model is not first
    assert made.model.model_tags == ["zoo_hf", "zeroth-order"]
    assert {name for name, p in made.model.named_parameters() if made.update.parameters.get(name) is not p} == set()


def test_without_arguments_the_zero_order_fields_have_their_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the Trainer makes a folder
    made = ZOOTrainer(tiny_lstm())
    assert {name: getattr(made.args, name) for name in OWN} == OWN | {"smoothing_radius": 2**-8}
    assert (made.args.learning_rate, made.args.max_grad_norm) == (5e-5, 0.0)


def test_training_again_goes_on_from_where_the_weights_are(trainer):
    model = tiny_lstm()
    made = trainer(model, texts(4))
    made.train()
    between = copy.deepcopy(model)
    estimates = Estimates()
    made.add_callback(estimates)
    made.train()
    coefficients = coefficients_by_hand(between, made.args, mean_loss(batch(texts(4)))).float()
    torch.testing.assert_close(estimates.seen[0].coefficients, coefficients, **EXACT)
    assert made.update.forward_passes == 32


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(texts(8))


@pytest.mark.parametrize(
    "stream",
    [
        Stream,
        lambda: datasets.Dataset.from_list(
            [{k: v.tolist() for k, v in t.items()} for t in texts(8)]
        ).to_iterable_dataset(),
    ],
    ids=["torch", "datasets"],
)
def test_a_stream_trains_as_the_same_examples_in_a_list(trainer, stream):
    models = []
    for examples in (texts(8), stream()):
        model = tiny_lstm()
        trainer(model, examples, max_steps=5, **IN_ORDER).train()
        models.append(weights(model))
    torch.testing.assert_close(*models, **EXACT)


def test_random_collators_in_workers_repeat_with_the_seed(trainer):
    def mask(examples):
        made = batch(examples)
        return made | {"labels": made["labels"].masked_fill(torch.rand(made["labels"].shape) < 0.5, -100)}

    seen = []
    for collator in (mask, mask, None):
        made = trainer(tiny_lstm(), texts(8), {"data_collator": collator}, dataloader_num_workers=1)
        seen.append(torch.stack([estimate.coefficients for estimate in run(made)]))
    torch.testing.assert_close(seen[0], seen[1], **EXACT)
    assert not seen[0].equal(seen[2])


def test_a_compiled_model_takes_the_same_steps(trainer):
    models = []
    for arguments in ({}, COMPILED):
        model = Quadratic()
        made = trainer(model, points(4), max_steps=3, **arguments)
        made.train()
        models.append(weights(model))
    assert made.model_wrapped is not model
    torch.testing.assert_close(*models, **EXACT)


def test_checkpointing_of_activations_is_switched_off_with_one_line(trainer, caplog):
    model = tiny_gpt2()
    model.train()
    logging.getLogger("zoo_hf").setLevel(logging.WARNING)
    made = trainer(model, texts(4), **{CHECKPOINTING: True}, dropout=True)
    made.train()
    assert [r.message for r in caplog.records if "heckpointing" in r.message] == [
        "Gradient checkpointing is switched off: no activations are kept for a backward pass."
    ]
    assert not any(vars(module).get("gradient_checkpointing") for module in model.modules())


def test_a_radius_at_which_curvature_outweighs_slopes_is_warned_of_once_with_advice(trainer, caplog):
    def valley(model, inputs):
        return sum(p.double().sum() for p in model.parameters()) ** 2  # whose bottom is near the start

    made = trainer(
        tiny_lstm(),
        texts(4),
        {"compute_objective": valley},
        num_directions=32,
        smoothing_radius=5.0,
        learning_rate=1e-9,
    )
    made.train()
    (warning,) = [record.message for record in caplog.records if "signal_to_noise" in record.message]
    assert "Try a quarter of smoothing_radius=5, or less" in warning
    assert all(signal < 0.6 for signal in logged(made, "signal_to_noise"))


def test_a_loss_with_slopes_is_not_warned_of(trainer, caplog):
    made = trainer(tiny_lstm(), texts(4), smoothing_radius=1e-3)
    made.train()
    assert all(signal > 5 for signal in logged(made, "signal_to_noise"))
    assert "signal_to_noise" not in caplog.text


def test_normalized_steps_are_the_same_for_a_loss_of_any_scale(trainer):
    ends = []
    for scale in (1.0, 1e3):
        model = tiny_lstm()
        scaled = {"compute_objective": lambda model, inputs, outputs, scale=scale: scale * outputs.loss}
        trainer(model, texts(4), scaled, normalize="loss_std", max_steps=3).train()
        ends.append(weights(model)["lm_head.weight"])
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)
    assert not torch.equal(ends[0], weights(tiny_lstm())["lm_head.weight"])
