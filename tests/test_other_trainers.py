"""Other trainers, adapters and models that are not ours: their own loss is minimised, and the rest stays as it is."""

import logging
from dataclasses import dataclass

import pytest
import torch
from conftest import texts, weights
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RwkvConfig,
    RwkvForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)
from trl import SFTConfig, SFTTrainer

from zoo_hf import CentralDifference, Direction, ZOOArguments, ZOOTrainer, ZOOTrainerMixin, gradient


# SFTConfig sets it by its old name: https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/base_config.py
RENAMED = "ignore:`gradient_checkpointing` is deprecated:FutureWarning"
# https://github.com/huggingface/peft/blob/v0.21.2/src/peft/peft_model.py reads it
RENAMED_PROPERTY = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


class ZOOSFTTrainer(ZOOTrainerMixin, SFTTrainer):
    """As a user would write it."""


@dataclass
class ZOOSFTConfig(ZOOArguments, SFTConfig):
    """As a user would write it."""


class ZOOSeq2SeqTrainer(ZOOTrainerMixin, Seq2SeqTrainer):
    """As a user would write it."""


@dataclass
class ZOOSeq2SeqConfig(ZOOArguments, Seq2SeqTrainingArguments):
    """As a user would write it."""


def tiny_llama(**sizes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    defaults = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**defaults | sizes, num_attention_heads=2, pad_token_id=0))


def loss_of(model: nn.Module, examples: list[dict[str, torch.Tensor]]) -> float:
    """Mean loss of a model in inference mode."""
    model.eval()
    tokens = torch.stack([example["input_ids"] for example in examples])
    with torch.no_grad():
        return model(input_ids=tokens, labels=tokens).loss.item()


@pytest.fixture
def sft(config, tokenizer):
    """`sft(model, examples, **arguments)`: a zero-order SFTTrainer, and the same model's stock one."""

    def make(model, examples, kind=ZOOSFTConfig, trainer=ZOOSFTTrainer, peft_config=None, **arguments):
        args = config(kind, **arguments)
        rows = Dataset.from_list([{"input_ids": example["input_ids"].tolist()} for example in examples])
        keywords = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer}
        return trainer(model, args, peft_config=peft_config, **keywords)

    return make


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"<{i}>": i for i in range(32)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<1>")), pad_token="<0>", eos_token="<2>"
    )


@pytest.mark.filterwarnings(RENAMED)
@pytest.mark.parametrize("kind", [ZOOSFTConfig, SFTConfig], ids=["ours", "plain"])
def test_sft_minimises_its_own_loss(sft, caplog, kind):
    model, examples = tiny_llama(), texts(4)
    arguments = {"kind": kind, "max_steps": 8, "learning_rate": 3e-2, "optim": "adamw_torch"}
    with caplog.at_level(logging.WARNING, logger="zoo_hf"):
        made = sft(model, examples, **arguments)
    lines = [record.message for record in caplog.records if "heckpointing" in record.message]
    assert lines == ["Gradient checkpointing is switched off: no activations are kept for a backward pass."]
    batch = next(iter(made.get_train_dataloader()))
    stock = sft(tiny_llama(), examples, SFTConfig, SFTTrainer)
    expected = stock.compute_loss(stock.model, dict(batch)).item()
    assert made.compute_loss(model, dict(batch)).item() == expected
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert made.evaluate()["eval_loss"] < expected - 0.1


@pytest.mark.filterwarnings(RENAMED)
@pytest.mark.filterwarnings(RENAMED_PROPERTY)
def test_sft_trains_only_the_adapter_that_it_made(sft):
    model = tiny_llama()
    base = weights(model)
    made = sft(model, texts(4), learning_rate=1e-2, peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    made.train()
    now = {name: p for name, p in made.model.named_parameters() if "lora_" not in name}
    assert {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in now} == base.keys()
    for name, parameter in now.items():
        assert torch.equal(parameter, base[name.removeprefix("base_model.model.").replace(".base_layer", "")])
    assert all("lora_" in name for name in made.update.parameters)


def keys(trainer, name: str) -> list[set[str]]:
    """Keys of the log's entries that have a certain one."""
    return [entry.keys() for entry in trainer.state.log_history if name in entry]


@pytest.mark.filterwarnings(RENAMED)
@pytest.mark.filterwarnings(RENAMED_PROPERTY)
@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["model", "adapter"])
def test_sft_logs_what_the_stock_trainer_logs_of_one_evaluation_a_batch(sft, adapter):
    made = {}
    for kind, trainer in ((SFTConfig, SFTTrainer), (ZOOSFTConfig, ZOOSFTTrainer)):
        steps = {"max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
        steps |= {"gradient_accumulation_steps": 2, "learning_rate": 0.0}
        own = {"num_directions": 3, "smoothing_radius": 1e-3} if kind is ZOOSFTConfig else {}
        made[trainer] = sft(tiny_llama(), texts(8), kind, trainer, peft_config=adapter, **steps, **own)
        made[trainer].train()
    stock, ours = made[SFTTrainer], made[ZOOSFTTrainer]
    figures = {
        "forward_passes_per_second",
        "coefficient_spread",
        "left_out",
        "signal_to_noise",
        "forward_passes",
        "tokens",
        "seconds",
    }
    assert keys(ours, "loss") == [k - {"grad_norm"} | figures for k in keys(stock, "loss")]
    assert keys(ours, "eval_loss") == [k | {"forward_passes", "tokens"} for k in keys(stock, "eval_loss")]
    for name in ("num_tokens", "eval_num_tokens"):
        values = [[entry[name] for entry in t.state.log_history if name in entry] for t in (stock, ours)]
        assert values[0] == values[1] == [2 * 8 * 8, 4 * 8 * 8]
    for expected, entry in zip(stock.state.log_history, ours.state.log_history, strict=True):
        for name in {"entropy", "eval_entropy", "mean_token_accuracy", "eval_mean_token_accuracy"} & entry.keys():
            assert entry[name] == pytest.approx(expected[name], abs=1e-2), "at weights that are almost the same"
    assert not any(ours._metrics.values()), "all were logged"


@pytest.mark.filterwarnings(RENAMED)
def test_what_sft_books_between_two_entries_of_the_log_does_not_grow_with_the_probes(sft):
    made = sft(tiny_llama(), texts(4), num_directions=8)
    batch = next(iter(made.get_train_dataloader()))
    for _ in range(3):
        made.training_step(made.model, batch)
    assert len(made._metrics["train"]["entropy"]) == 3
    assert made._metrics["train"]["num_tokens"] == [3 * 4 * 8]
    assert made._metrics["eval"] == {}


def test_seq2seq_trains_and_predicts_with_generate(config):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    examples = texts(4)
    args = config(
        ZOOSeq2SeqConfig,
        max_steps=8,
        learning_rate=3e-2,
        optim="adamw_torch",
        predict_with_generate=True,
        generation_max_length=5,
        generation_num_beams=1,
    )
    made = ZOOSeq2SeqTrainer(model, args, train_dataset=examples, eval_dataset=examples)
    start = made.evaluate()["eval_loss"]
    tokens = torch.stack([example["input_ids"] for example in examples])
    with torch.no_grad():
        assert start == pytest.approx(model(input_ids=tokens, labels=tokens).loss.item(), rel=1e-6)
    made.train()
    output = made.predict(examples)
    assert output.metrics["test_loss"] < start - 0.1
    generated = model.generate(tokens, max_length=5, num_beams=1, do_sample=False)
    assert output.predictions[:, :5].tolist() == generated.tolist()  # padded to the model's default length
    assert not output.predictions[:, 5:].any()


def lora(model: nn.Module) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "v_proj"]))


@pytest.mark.filterwarnings(RENAMED_PROPERTY)
@pytest.mark.parametrize("bits", [None, 8, 4], ids=["float32", "8-bit", "4-bit"])
def test_lora_trains_the_adapter_and_leaves_the_base_bit_for_bit(config, tmp_path, bits):
    examples = texts(8)
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")

    def base():
        quantised = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True}
        arguments = {"quantization_config": BitsAndBytesConfig(**quantised), "device_map": "cpu"} if bits else {}
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", **arguments)

    model = lora(base())
    start = loss_of(model, examples)  # in the first one bitsandbytes lays 4-bit weights out for the CPU's kernels
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    args = config(max_steps=20, learning_rate=3e-2, optim="adamw_torch", per_device_train_batch_size=8)
    made = ZOOTrainer(model, args, train_dataset=examples)
    made.train()
    assert {name.rsplit(".", 3)[1] for name in made.update.parameters} == {"lora_A", "lora_B"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != ("lora_" in name), name
    trained = loss_of(model, examples)
    assert trained < start - 0.01
    made.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert loss_of(again, examples) == trained


@pytest.mark.filterwarnings(RENAMED_PROPERTY)
def test_a_step_on_an_adapter_is_the_estimate_over_the_adapter_alone(config):
    model, examples = lora(tiny_llama()), texts(4)
    start = weights(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tokens = torch.stack([example["input_ids"] for example in examples])
    directions = [Direction(42, 0, i) for i in range(4)]
    model.eval()
    with torch.no_grad():
        estimate = CentralDifference(1e-2)(lambda: model(input_ids=tokens, labels=tokens).loss, parameters, directions)
    args = config(max_steps=1, learning_rate=0.5)
    ZOOTrainer(
        model, args, train_dataset=examples, data_collator=lambda _: {"input_ids": tokens, "labels": tokens}
    ).train()
    for name, parameter in parameters.items():
        expected = start[name] - 0.5 * gradient(estimate, name, parameter)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("evaluated_before", [False, True])
def test_rwkv_is_not_rewritten_between_training_and_evaluation(config, caplog, evaluated_before):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 4}
    model = RwkvForCausalLM(RwkvConfig(**sizes, rescale_every=1, context_length=8))
    theta, examples = weights(model), texts(8)
    tokens = torch.stack([example["input_ids"] for example in examples])
    expected = model.train()(input_ids=tokens, labels=tokens).loss.item()
    if evaluated_before:  # its weights are now halved from layer to layer
        assert loss_of(model, examples) == pytest.approx(expected, rel=1e-3)
        assert not torch.equal(
            weights(model)["rwkv.blocks.3.attention.output.weight"], theta["rwkv.blocks.3.attention.output.weight"]
        )
    args = config(learning_rate=0.0, max_steps=4, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=8)
    with caplog.at_level(logging.WARNING, logger="zoo_hf"):
        made = ZOOTrainer(model, args, train_dataset=examples, eval_dataset=examples)
    assert ["rescale_every" in record.message for record in caplog.records] == [True]
    made.train()
    for name, parameter in weights(model).items():
        assert torch.equal(parameter, theta[name]), name
    losses = [entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry]
    assert losses == pytest.approx([expected, expected], rel=1e-6)


class Normalised(nn.Module):
    """A classifier with BatchNorm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, features, labels):
        logits = self.head(self.norm(features))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_without_dropout_the_buffers_of_batch_norm_stay(config, rng):
    model = Normalised()
    examples = [{"features": row, "labels": int(row.sum() > 0)} for row in torch.randn(8, 4, generator=rng)]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    start = weights(model)
    ZOOTrainer(model, config(max_steps=3), train_dataset=examples).train()
    assert before.keys() == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert not any(torch.equal(parameter, start[name]) for name, parameter in weights(model).items())
