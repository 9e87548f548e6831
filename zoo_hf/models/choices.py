"""What runs on a device: of the recurrences, for one member and in a population, and of everything else."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.choice import backend
from ..kernels.scan import fits
from .elman import elman_forms
from .gru import GRUWeights, gru_forms
from .lstm import lstm_forms
from .modeling_rnn import CELLS
from .recurrent_layer import LayerWeights
from .slstm import slstm_forms


FORMS: dict[str, Callable[..., list[str]]] = {
    "lstm": lstm_forms,
    "gru": gru_forms,
    "slstm": slstm_forms,
    "elman": elman_forms,
}
HEADS = ((8, 64), (1, 512))  # number and units
OTHERS = {  # what they have for float32, the best first
    "rwkv7": ["triton", "fla", "plain"],
    "mamba2": ["triton", "plain"],
    "noise, linear layers, head and loss": ["triton", "plain"],
}


def choices(device: torch.device | None = None) -> dict[str, str]:
    """For each cell, the forms that run without gradients in float32, by default on a GPU where there is one.

    They depend on sizes: those are for 8 heads of 64 units and for one of 512, and 8 sequences of 64 tokens.

    Raises:
        ValueError: `ZOO_HF_KERNELS` asks for what cannot run here.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cells = {cell: "; ".join(choice(cell, device, *heads) for heads in HEADS) for cell in CELLS}
    return cells | {name: backend(preferred, device) for name, preferred in OTHERS.items()}


@torch.no_grad()
def choice(cell: str, device: torch.device, heads: int, size: int) -> str:
    """The same for heads of one size."""
    gates = CELLS[cell].gates
    weights = torch.empty(gates, heads, size, size, device=device)

    def form(inputs: Tensor) -> str:
        fields = (weights,) * (4 if cell == "gru" else 3)  # of which the recurrent one alone is read
        names = FORMS[cell](inputs, (GRUWeights if cell == "gru" else LayerWeights)(*fields))
        name = backend(names, device)
        kind = "fused" if fits(gates, size, torch.float32) else "alternating"
        return f"{name} ({kind})" if name == "triton" else name

    found: list[str] = []
    inputs = torch.empty(2, 8, 64, 1, device=device)
    torch.func.vmap(lambda own: found.append(form(own)) or own)(inputs)  # type: ignore[func-returns-value]
    return f"{heads} × {size} units: {form(inputs[0])}, in a population {found[0]}"
