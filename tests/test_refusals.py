"""What makes no sense is refused at construction, with a remedy; what has no effect is switched off, with a line."""

import logging

import pytest
import torch
from accelerate import Accelerator
from conftest import CHECKPOINTING, texts, tiny_lstm
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from zoo_hf import Trajectory, ZOOTrainer
from zoo_hf.noise import parameter_id


def messages(caplog, word: str) -> list[str]:
    """What was logged about something."""
    return [record.message for record in caplog.records if word in record.message]


def tiny_gpt2() -> GPT2LMHeadModel:
    sizes = {"vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))


@pytest.mark.parametrize(("name", "value"), [("fsdp", True), ("deepspeed", {"zero_optimization": {"stage": 2}})])
def test_sharding_in_the_arguments_is_refused(config, name, value):
    args = config()
    setattr(args, name, value)  # in the constructor it is refused sooner
    with pytest.raises(ValueError, match=r"Remove `fsdp`, `deepspeed` .* every process holds the whole model"):
        ZOOTrainer(tiny_lstm(), args)


@pytest.mark.parametrize("arguments", [{"fsdp": True}, {"deepspeed": {"zero_optimization": {"stage": 2}}}])
def test_sharding_is_refused_before_transformers_asks_for_its_packages(config, arguments):
    with pytest.raises(ValueError, match=r"Remove `fsdp`, `deepspeed`"):
        config(**arguments)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Trainer, "is_fsdp_enabled"), (Trainer, "is_deepspeed_enabled"), (Accelerator, "parallelism_config")],
)
def test_sharding_that_accelerate_was_configured_for_is_refused(config, monkeypatch, owner, name):
    create = Trainer.create_accelerator_and_postprocess

    def found(trainer):  # what it would find on GPUs; on a CPU accelerate ignores its own configuration
        create(trainer)
        monkeypatch.setattr(trainer if owner is Trainer else owner, name, True)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", found)
    with pytest.raises(ValueError, match=r"Remove `fsdp`, `deepspeed` .* also from the accelerate configuration"):
        ZOOTrainer(tiny_lstm(), config())


def test_a_float16_model_on_a_cpu_is_refused(config):
    with pytest.raises(ValueError, match=r"float16 on a CPU .*: use bfloat16 or float32"):
        ZOOTrainer(tiny_lstm().half(), config())


def test_float16_autocast_on_a_cpu_is_refused(config):
    with pytest.raises(ValueError, match=r"float16 on a CPU .*: use bfloat16 or float32"):
        ZOOTrainer(tiny_lstm(), config(fp16=True))


@pytest.mark.parametrize(
    ("dtype", "arguments"),
    [
        (torch.bfloat16, {"smoothing_radius": 1e-6}),
        (torch.float32, {"smoothing_radius": 1e-6, "bf16": True}),
        (torch.float32, {"smoothing_radius": 1e-10}),
    ],
    ids=["weights", "autocast", "float32"],
)
def test_a_radius_that_most_weights_do_not_feel_is_refused(config, dtype, arguments):
    name = "float32" if arguments["smoothing_radius"] < 1e-6 else "bfloat16"
    with pytest.raises(
        ValueError, match=rf"`smoothing_radius`=.* moves only .* of the weights in torch\.{name}: raise"
    ):
        ZOOTrainer(tiny_lstm().to(dtype), config(**arguments))


@pytest.mark.parametrize("arguments", [{}, {"bf16": True}], ids=["weights", "autocast"])
def test_the_share_of_weights_that_do_not_feel_the_radius_is_logged(config, caplog, arguments):
    model = tiny_lstm()
    theta = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    if not arguments:
        model, theta = model.bfloat16(), theta.bfloat16()
    still = ((theta.double() + 1e-3).to(theta.dtype).bfloat16() == theta.bfloat16()).float().mean().item()
    assert 0.05 < still < 0.5
    with caplog.at_level(logging.WARNING, logger="zoo_hf"):
        ZOOTrainer(model, config(smoothing_radius=1e-3, **arguments))
    assert messages(caplog, "smoothing_radius") == [
        f"smoothing_radius=0.001 leaves {still:.0%} of the weights in torch.bfloat16 where they are: raise it."
    ]


def test_nothing_is_logged_about_a_radius_that_all_weights_feel(config, caplog):
    with caplog.at_level(logging.WARNING, logger="zoo_hf"):
        ZOOTrainer(tiny_lstm(), config())
    assert caplog.records == []


def test_8_bit_mixed_precision_is_refused(config, monkeypatch):
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp8"))  # as its configuration may say
    with pytest.raises(ValueError, match=r"mixed_precision='fp8' .* use 'bf16' or 'no'"):
        ZOOTrainer(tiny_lstm(), config())


def test_a_model_without_a_trainable_parameter_is_refused(config):
    with pytest.raises(
        ValueError, match="No parameter has `requires_grad=True`: unfreeze some, or add a PEFT adapter"
    ):
        ZOOTrainer(tiny_lstm().requires_grad_(False), config())


def test_a_parameter_that_is_not_contiguous_is_refused(config):
    model = tiny_lstm()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().t().contiguous().t())
    with pytest.raises(ValueError, match=r"'lm_head\.weight' is not contiguous: .* `\.contiguous\(\)`"):
        ZOOTrainer(model, config())


class Collision(nn.Module):
    """Two parameters whose names have the same CRC-32."""

    def __init__(self):
        super().__init__()
        self.plumless, self.buckeroo = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def forward(self, input_ids, labels=None):
        raise AssertionError("a model that is refused is not run")


def test_two_names_with_one_id_are_refused(config):
    assert parameter_id("plumless") == parameter_id("buckeroo") == 0x4DDB0C25
    with pytest.raises(ValueError, match="'plumless' and 'buckeroo' have the same 32-bit id: rename one"):
        ZOOTrainer(Collision(), config())


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_is_not_a_32_bit_word_is_refused(config, seed):
    with pytest.raises(ValueError, match=rf"`seed` must be in \[0, 2\*\*32\), got {seed}"):
        config(seed=seed)


@pytest.mark.parametrize("kind", [None, TrainingArguments], ids=["ours", "plain"])
def test_values_that_were_set_after_the_arguments_were_made_are_checked_too(config, kind):
    args = config(kind) if kind else config()
    args.num_directions = 0
    with pytest.raises(ValueError, match="`num_directions` must be at least 1, got 0"):
        ZOOTrainer(tiny_lstm(), args)


def test_what_a_search_sets_in_plain_arguments_outlives_the_next_accelerator(config):
    made = ZOOTrainer(tiny_lstm(), config(TrainingArguments))
    made.args.num_directions, made.args.max_grad_norm = 3, 1.0
    made.create_accelerator_and_postprocess()  # as the Trainer does for every trial
    assert (made.args.num_directions, made.args.max_grad_norm) == (3, 1.0)


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"train_sampling_strategy": "batch_rebalance"}, "use 'random' or 'group_by_length'"),
        ({"auto_find_batch_size": True}, "find it with one process, then set `per_device_train_batch_size`"),
    ],
    ids=["batch_rebalance", "auto_find_batch_size"],
)
def test_what_would_give_ranks_different_batches_is_refused_with_several(config, two_processes, arguments, remedy):
    with pytest.raises(ValueError, match=remedy):
        ZOOTrainer(tiny_lstm(), config(**arguments))


@pytest.mark.parametrize("where", ["arguments", "model", "both"])
def test_gradient_checkpointing_is_switched_off_with_one_line(config, caplog, where):
    model = tiny_gpt2()
    if where != "arguments":
        getattr(model, f"{CHECKPOINTING}_enable")()
    args = config(**{CHECKPOINTING: where != "model"})
    with caplog.at_level(logging.WARNING, logger="zoo_hf"):
        made = ZOOTrainer(model, args, train_dataset=texts(4))
        made.train()
    assert messages(caplog, "heckpointing") == [
        "Gradient checkpointing is switched off: no activations are kept for a backward pass."
    ]
    assert not getattr(model, f"is_{CHECKPOINTING}")
    assert {value for name, value in vars(args).items() if name.endswith("_checkpointing")} == {False}


def test_of_several_gpus_in_one_process_the_first_is_used_and_the_launcher_named(config, caplog):
    args = config(max_steps=1)
    args._n_gpu = 2
    model = tiny_lstm()
    with caplog.at_level(logging.WARNING, logger="zoo_hf"):
        made = ZOOTrainer(model, args, train_dataset=texts(8))
        made.train()
    assert messages(caplog, "GPUs") == [
        "2 GPUs in one process: the first is used. To use all of them, start with "
        "`accelerate launch --num_processes 2 <script>`."
    ]
    assert made.model_wrapped is model
    assert made.get_total_train_batch_size(args) == 4


@pytest.mark.parametrize("dropout", [False, True])
def test_neftune_without_training_mode_is_named(config, caplog, dropout):
    with caplog.at_level(logging.WARNING, logger="zoo_hf"):
        ZOOTrainer(tiny_lstm(), config(neftune_noise_alpha=5.0, dropout=dropout))
    expected = "NEFTune is off, as probes run in inference mode: set `dropout=True` to train with its noise."
    assert messages(caplog, "NEFTune") == ([] if dropout else [expected])


@pytest.mark.parametrize(("spread", "radius"), [(1.0, 2**-6), (0.6, 2**-7), (0.02, 2**-12), (0.0, 2**-7)])
def test_the_default_smoothing_radius_is_a_power_of_two_near_a_64th_of_the_weights_root_mean_square(
    trainer, spread, radius
):
    model = tiny_lstm()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(spread * torch.ones_like(parameter))
    made = trainer(model, texts(4), smoothing_radius=None)
    assert made.args.smoothing_radius == radius
    assert trainer(model, texts(4), smoothing_radius=0.3).args.smoothing_radius == 0.3


def test_frozen_weights_have_no_part_in_the_default_smoothing_radius(trainer):
    model = tiny_lstm()
    model.get_input_embeddings().weight.requires_grad_(False).fill_(100.0)
    assert trainer(model, texts(4), smoothing_radius=None).args.smoothing_radius < 0.01


def test_a_run_of_default_radius_is_resumed_and_recorded_with_the_number(trainer, tmp_path):
    made = trainer(tiny_lstm(), texts(4), smoothing_radius=None, save_strategy="steps", save_steps=1)
    made.train()
    assert Trajectory.open(tmp_path / "trajectory.zoo").header.settings["smoothing_radius"] == 2**-8
    again = trainer(tiny_lstm(), texts(4), smoothing_radius=None, max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
