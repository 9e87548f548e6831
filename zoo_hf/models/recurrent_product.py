"""The product of every recurrent step, a + R h: with a matrix that oneDNN has packed once for all steps, or plainly.

Letters: B sequences, T tokens of each, N heads of D = H/N units, G gates.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .heads import recurrent_blocks


# The least that packing pays for, measured on a CPU with one and two threads: 1.3 to 3 times faster products.
ENTRIES, ROWS, STEPS = 2**19, 4, 16


def packing_pays(inputs: Tensor, recurrent_weight: Tensor) -> bool:
    """Whether it does for inputs (B, T, input_size) and R (G, N, D, D). The kernel has no derivative and no vmap."""
    heads, (rows, steps) = recurrent_weight.shape[1], inputs.shape[:2]
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch.is_grad_enabled():
        return False
    if inputs.device.type != "cpu" or inputs.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    large = heads == 1 and recurrent_weight.numel() >= ENTRIES and rows >= ROWS and steps >= STEPS
    return large and torch.backends.mkldnn.is_available()


def recurrent_product(inputs: Tensor, recurrent_weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of a (N, B, G·D) and h (N, B, D) that returns a + R h, (N, B, G·D).

    Args:
        inputs: of the layer, (B, T, input_size); they decide how.
        recurrent_weight: R, (G, N, D, D) [gate, head, out, in].
    """
    if not packing_pays(inputs, recurrent_weight):
        blocks = recurrent_blocks(recurrent_weight)
        return lambda a, h: torch.baddbmm(a, h, blocks)
    packed = torch.ops.mkldnn._reorder_linear_weight(recurrent_weight.flatten(0, 2), len(inputs))
    return lambda a, h: torch.ops.mkldnn._linear_pointwise.binary(h[0], a[0], packed, None, "add")[None]
