"""The recurrent models of transformers, each tiny, overfit one batch without backpropagation.

    python benchmarks/transformers_models.py                  # all, into docs/transformers.md; 3 minutes on one core
    python benchmarks/transformers_models.py --models rwkv    # on the terminal alone

`tests/test_transformers_models.py` runs the same models on the same batch with the same arguments. Beside them here:
the stock Trainer, which makes as many optimizer steps by backpropagation, and the speed of a step, noise and update
included, on that batch and on longer sequences. Speeds are medians, all models in turn in one process.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from zoo_hf import ZOOConfig, ZOOTrainer


PAGE = Path(__file__).parent.parent / "docs" / "transformers.md"
MARKS = "<!-- table -->\n", "<!-- /table -->\n"  # the table of the page stands between them

VOCABULARY, STEPS, DIRECTIONS = 16, 20, 16
ARGUMENTS = {
    "max_steps": STEPS,
    "learning_rate": 5e-2,
    "adam_beta1": 0.5,  # twenty steps are too few for the averages of the defaults
    "adam_beta2": 0.95,
}
LONG = 8, 128  # sequences and tokens of a batch that is only timed
TOKENS = f"tokens/s, {LONG[0]} × {LONG[1]}"  # a column


class Small(NamedTuple):
    """A tiny model: what its configuration has beyond `COMMON`, and what a reader should know of it."""

    sizes: dict[str, Any]
    remark: str


COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
}
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}
SSD = ATTENTION | {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 8}
DELTA = ATTENTION | {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1}

MODELS = {
    "rwkv": Small({"intermediate_size": 16}, "RWKV-4, a loop over tokens; `rescale_every` is set to 0"),
    "mamba": Small({"state_size": 8}, "a loop over tokens"),
    "falcon_mamba": Small({"state_size": 8}, "as mamba, with norms"),
    "mamba2": Small({"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8}, "in chunks"),
    "xlstm": Small(
        {"num_heads": 2, "qk_dim_factor": 2.0, "v_dim_factor": 2.0, "ffn_proj_factor": 1.0, "chunk_size": 8}
        | {"ffn_round_up_to_multiple_of": 16},
        "mLSTM in chunks; `max_inference_chunksize` is raised",
    ),
    "recurrent_gemma": Small(
        {"num_attention_heads": 2, "intermediate_size": 16, "block_types": ["recurrent", "attention"]},
        "RG-LRU, a loop over tokens, and attention",
    ),
    "jamba": Small(
        ATTENTION | EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
        "mamba, attention, experts",
    ),
    "bamba": Small(SSD | {"attn_layer_indices": [1]}, "mamba2 and attention"),
    "zamba": Small(
        # older versions of transformers try its kernels on a CPU, too
        ATTENTION | {"layers_block_type": ["hybrid", "hybrid"], "mamba_d_state": 8, "use_mamba_kernels": False},
        "mamba and one attention for all layers; at least two hybrid layers",
    ),
    "zamba2": Small(
        ATTENTION
        | {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 4, "mamba_d_state": 8, "chunk_size": 8},
        "mamba2 and one attention for all layers",
    ),
    "falcon_h1": Small(SSD | {"mamba_d_ssm": 64, "num_hidden_layers": 1}, "mamba2 beside attention"),
    "nemotron_h": Small(
        ATTENTION
        | {"layers_block_type": ["mamba", "attention"], "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 16}
        | {"ssm_state_size": 8, "n_groups": 1, "chunk_size": 8},
        "mamba2 and attention",
    ),
    "granitemoehybrid": Small(
        SSD
        | {"layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1}
        | {"shared_intermediate_size": 16},
        "mamba2, attention, experts",
    ),
    "qwen3_next": Small(
        DELTA | EXPERTS | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        "gated delta rule in chunks, attention, experts",
    ),
    "qwen3_5_text": Small(DELTA, "gated delta rule in chunks, and attention"),
    "olmo_hybrid": Small(DELTA, "gated delta rule in chunks, and attention"),
    "kimi_linear": Small(
        ATTENTION
        | {"layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 8, "linear_num_heads": 2}
        | {"kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
        | {"mlp_layer_types": ["dense", "sparse"], "moe_intermediate_size": 16, **EXPERTS},
        "delta rule with a decay a channel, in chunks; latent attention, experts",
    ),
    "minimax": Small(
        ATTENTION
        | {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "block_size": 8}
        | {"num_local_experts": 2, "num_experts_per_tok": 1},
        "lightning attention in chunks, attention, experts",
    ),
    "lfm2": Small(
        ATTENTION | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        "short convolutions and attention",
    ),
}
HERE = [name for name in MODELS if name in CONFIG_MAPPING]  # what the installed version of transformers has


def main() -> None:
    from report import save_results, table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=HERE, default=HERE)
    parser.add_argument("--rounds", type=int, default=5, help="Times a step of each model is timed.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name in options.models:
        rows[name] = overfit(name)
        print(rows[name], flush=True)
    for inputs, speed in ((batch(), "forward passes/s"), (batch(*LONG), TOKENS)):
        for name, rate in rates(options.models, inputs, options.rounds).items():
            rows[name][speed] = rate * (inputs["input_ids"].numel() if speed == TOKENS else 1)
    for name, row in rows.items():
        row["remark"] = MODELS[name].remark
    print(table(list(rows.values())))
    if set(options.models) == set(MODELS):
        save_results("transformers_models", list(rows.values()), plot)
        write_page(table(list(rows.values())))


def small(name: str, **config: Any) -> PreTrainedModel:
    """A model of 7 to 41 thousand weights, the same at every call."""
    set_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(COMMON | MODELS[name].sizes | config)))


def batch(rows: int = 3, tokens: int = 5) -> dict[str, torch.Tensor]:
    """Random tokens, (rows, tokens); nothing can predict them but memory."""
    ids = torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 0] = -100  # nothing predicts it; so older Trainers, too, count as many labels as predictions
    return {"input_ids": ids, "labels": labels}


def trainer_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor], kind: type = ZOOTrainer, **arguments: Any):
    """A trainer, not yet started, that gets these inputs in every step and in every evaluation."""
    own = {"num_directions": DIRECTIONS, "smoothing_radius": 1e-2, "probes": "serial"} if kind is ZOOTrainer else {}
    args = (ZOOConfig if kind is ZOOTrainer else TrainingArguments)(
        tempfile.mkdtemp(),
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **(ARGUMENTS | {"logging_steps": STEPS} | own | arguments),
    )
    examples = range(args.max_steps)
    return kind(model, args, train_dataset=examples, eval_dataset=[0], data_collator=lambda _: dict(inputs))


def overfit(name: str) -> dict[str, object]:
    """The losses of a row of the table."""
    trainer, stock = trainer_of(small(name), batch()), trainer_of(small(name), batch(), Trainer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    stock.train()
    return {
        "model": f"`{name}`",
        "parameters": trainer.model.num_parameters(),
        "loss before": before,
        f"after {STEPS} steps": trainer.evaluate()["eval_loss"],
        "by backpropagation": stock.evaluate()["eval_loss"],
    }


def rates(names: list[str], inputs: dict[str, torch.Tensor], rounds: int) -> dict[str, float]:
    """Forward passes a second of a training step of each model, medians; all models in turn (A B C … A B C …)."""
    trainers = {name: trainer_of(small(name), inputs, learning_rate=0.0) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds + 1):  # the first is a warm-up
        for name, trainer in trainers.items():
            start = time.perf_counter()
            trainer.training_step(trainer.model, inputs)
            trainer.optimizer.step()
            if round_:
                seconds[name].append(time.perf_counter() - start)
        print(f"round {round_}/{rounds}", flush=True)
    return {name: 2 * DIRECTIONS / statistics.median(times) for name, times in seconds.items()}


def write_page(shown: str) -> None:
    """Put the table between its marks on the page."""
    before, after = MARKS
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(before)
    PAGE.write_text(f"{head}{before}{shown}\n{after}{rest.partition(after)[2]}", encoding="utf-8")


def plot(axes, rows: list[dict]) -> None:
    axes.barh([row["model"].strip("`") for row in rows], [row[TOKENS] for row in rows])
    axes.set_xlabel(TOKENS)
    axes.invert_yaxis()


if __name__ == "__main__":
    main()
