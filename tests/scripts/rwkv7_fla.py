"""A tiny RWKV-7 model of the package flash-linear-attention (fla), saved by it, and what it computes, without a GPU.

    pip install --no-deps flash-linear-attention==0.6.0 fla-core==0.6.0 triton==3.7.1 einops
    TRITON_INTERPRET=1 python tests/scripts/rwkv7_fla.py tests/data/rwkv7_fla

writes the checkpoint and `answers.safetensors`: ids (B, T), mask (B, T) of left padding, and for fuse_norm False and
True logits (B, T, V) without and with the mask, and the state after the tokens without mask: matrices (B, L, N, D, D),
inputs (B, L, 2, H). And all initial values that are not random, under their names.
"""

import re
import sys
import warnings

import torch
from safetensors.torch import save_file
from triton.runtime.autotuner import Autotuner


def first_choice_only(autotuner, fn, arg_names, configs, *args, prepare=Autotuner.__init__, **kwargs):
    """There is no GPU to time the choices on."""
    prepare(autotuner, fn, arg_names, configs[:1], *args, **kwargs)


Autotuner.__init__ = first_choice_only
warnings.simplefilter("ignore")
from fla.models.rwkv7 import RWKV7Config, RWKV7ForCausalLM  # noqa: E402


SIZES = {"vocab_size": 23, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16, "intermediate_size": 48}
RANKS = {"decay_low_rank_dim": 5, "a_low_rank_dim": 4, "v_low_rank_dim": 3, "gate_low_rank_dim": 6}
RANDOM = re.compile(r"_proj|lora\.2\.weight")
PLAIN = {"fuse_cross_entropy": False, "use_l2warp": False}


def initial_model(fuse_norm: bool) -> RWKV7ForCausalLM:
    torch.manual_seed(0)
    return RWKV7ForCausalLM(RWKV7Config(**SIZES, **RANKS, **PLAIN, fuse_norm=fuse_norm)).eval()


def displaced_model(fuse_norm: bool) -> RWKV7ForCausalLM:
    """fla's initial weights, displaced: what starts as zero or one would hide an error behind it."""
    model = initial_model(fuse_norm)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def answers(ids: torch.Tensor, mask: torch.Tensor, folder: str) -> dict[str, torch.Tensor]:
    found = {"ids": ids, "mask": mask}
    for name, parameter in initial_model(fuse_norm=False).named_parameters():
        if ("attn." in name or "ffn.x_k" in name) and not RANDOM.search(name):
            found[f"initial {name}"] = parameter
    for fuse_norm in (True, False):
        model = displaced_model(fuse_norm)
        outputs = model(ids, use_cache=True)
        layers = [outputs.past_key_values[layer] for layer in range(SIZES["num_hidden_layers"])]
        name = f"fuse_norm={fuse_norm}"
        found[f"{name} logits"] = outputs.logits
        found[f"{name} masked logits"] = model(ids, attention_mask=mask).logits
        found[f"{name} matrices"] = torch.stack([layer["recurrent_state"] for layer in layers], dim=1)
        inputs = [layer[part].view(len(ids), -1) for layer in layers for part in ("conv_state", "ffn_state")]
        found[f"{name} inputs"] = torch.stack(inputs, dim=1).unflatten(1, (-1, 2))
    model.save_pretrained(folder)
    return found


if __name__ == "__main__":
    torch.manual_seed(1)
    ids, mask = torch.randint(SIZES["vocab_size"], (2, 37)), torch.ones(2, 37, dtype=torch.long)
    mask[0, :9] = 0
    found = answers(ids, mask, sys.argv[1])
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, f"{sys.argv[1]}/answers.safetensors")
