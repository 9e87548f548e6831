"""Recurrent layers for deep stacks: each is added to its input, and may be followed by a feed-forward network.

    x ← x + layer(RMSNorm(x))    x ← x + W₂ gelu(W₁ RMSNorm(x))

Letters: B sequences, T tokens of each, H units, S slots of the layer's state.

References:
    Ruibin Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020, arXiv:2002.04745.
    Biao Zhang, Rico Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .recurrent_layer import RecurrentLayer


EPSILON = 1e-6  # torch's default depends on the dtype: 0.008 in bfloat16


class FeedForward(nn.Module):
    """W₂ gelu(W₁ x), without biases.

    Args:
        hidden_size: H, width of input and output.
        intermediate_size: rows of W₁.
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H) to (B, T, H)."""
        return self.down(F.gelu(self.up(x)))


class Residual(nn.Module):
    """A recurrent layer, and a feed-forward network if it has a width, each added to its input.

    Args:
        layer: takes inputs, state and mask, and returns outputs and state, see `RecurrentLayer`.
        hidden_size: H, width of its inputs and outputs.
        intermediate_size: width of the feed-forward network; 0 for none.
    """

    def __init__(self, layer: RecurrentLayer, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=EPSILON)
        self.layer = layer
        self.feed_forward = None
        if intermediate_size > 0:
            norm = nn.RMSNorm(hidden_size, eps=EPSILON)
            self.feed_forward = nn.Sequential(norm, FeedForward(hidden_size, intermediate_size))

    def forward(self, x: Tensor, state: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs (B, T, H) and final state (B, S, H), see `RecurrentLayer.forward`."""
        outputs, state = self.layer(self.norm(x), state, real)
        x = x + outputs
        if self.feed_forward is not None:
            x = x + self.feed_forward(x)
        return x, state
