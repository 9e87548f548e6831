"""RWKV-7 weights in the formats of others, under our names: fla's older files, and the authors' .pth files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor


# the authors' names of modules, and ours
OUTER = {"emb": "model.embeddings", "ln_out": "model.norm", "head": "lm_head"}
PARTS = {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm", "att": "attn"}
ATTENTION = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj", "ln_x": "g_norm"}
LORA = {"0": "lora.2.bias", "1": "lora.0.weight", "2": "lora.2.weight"}  # w0 + f(x w1) w2


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """All weights of a .pth file, of a folder, or of a model on the Hub."""
    if str(source).endswith(".pth"):
        return read_torch(source)
    patterns = ["model*.safetensors", "pytorch_model*.bin"]
    folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(str(source), allow_patterns=patterns))
    for pattern in patterns:
        files = sorted(folder.glob(pattern))
        if files:
            parts = [load_file(file) if file.suffix == ".safetensors" else read_torch(file) for file in files]
            return {name: weight for part in parts for name, weight in part.items()}
    raise ValueError(f"No weights ({' or '.join(patterns)}) in {folder}; name a folder that has some.")


def read_torch(file: str | Path) -> dict[str, Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def from_fla(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, with the six mixes of an attention apart, which older files keep as one `x_x` (6, 1, 1, H)."""
    ours: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name.endswith(".x_x"):
            ours |= {f"{name[:-1]}{mix}": part.view(1, 1, -1) for mix, part in zip("rwkvag", weight, strict=True)}
        else:
            ours[name] = weight
    return ours


def from_original(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' weights under our names and in our shapes."""
    ours = {}
    for name, weight in weights.items():
        if name.startswith("blocks.0.att.v") and name[-1].isdigit():
            continue  # the first layer mixes no values; some files have those weights nevertheless
        new_name = our_name(name)
        if weight.dim() == 3:  # (1, 1, H)
            weight = weight.view(1, 1, -1) if ".attn.x_" in new_name else weight.flatten()
        ours[new_name] = weight.mT.contiguous() if ".lora." in new_name and weight.dim() == 2 else weight
    return ours


def our_name(name: str) -> str:
    """Our name of a weight of the authors'; one that they do not have either is left as it is."""
    first, *rest = name.split(".")
    if first in OUTER:
        return ".".join([OUTER[first], *rest])
    if first != "blocks":
        return name
    layer, part, module, *rest = rest
    if part == "att" and module[1:] in LORA:
        module = f"{module[0]}_lora.{LORA[module[1:]]}"
    elif part == "att":
        module = ATTENTION.get(module, module)
    return ".".join(["model.layers", layer, PARTS.get(part, part), module, *rest])


def sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of the configuration that weights under our names tell.

    Raises:
        ValueError: they are not those of an RWKV-7 model.
    """
    if not {"model.embeddings.weight", "model.layers.0.attn.r_k"} <= weights.keys():
        some = ", ".join(sorted(weights)[:3]) or "none at all"
        raise ValueError(f"The weights are not those of an RWKV-7 model: {some}; take a file that has them all.")
    vocab_size, hidden_size = weights["model.embeddings.weight"].shape
    last = max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
    attention = f"model.layers.{last}.attn."
    ranks = {"decay": "w", "a": "a", "v": "v", "gate": "g"}
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": last + 1,
        "head_dim": weights[attention + "r_k"].shape[1],
        "intermediate_size": len(weights[f"model.layers.{last}.ffn.key.weight"]),
        "norm_bias": "model.norm.bias" in weights,
        "norm_first": "model.layers.0.pre_norm.weight" in weights,
        "tie_word_embeddings": "lm_head.weight" not in weights,
    } | {
        f"{name}_low_rank_dim": len(weights[f"{attention}{letter}_lora.lora.0.weight"])
        for name, letter in ranks.items()
        if f"{attention}{letter}_lora.lora.0.weight" in weights  # a single layer mixes no values
    }
