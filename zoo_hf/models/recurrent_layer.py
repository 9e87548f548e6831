"""What the recurrent layers share: their parameters.

Letters: B sequences, T tokens of each, H hidden units, N heads of D = H/N units, G gates, S slots of the state.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class LayerWeights(NamedTuple):
    """The parameters of one layer.

    Args:
        input: W_in, (G·H, input_size).
        recurrent: R, (G, N, D, D) [gate, head, out, in]; for N = 1 viewed as (G·H, H) it is torch's `weight_hh_l0`.
        bias: b, (G·H): the sum of torch's two.
    """

    input: Tensor
    recurrent: Tensor
    bias: Tensor


class RecurrentLayer(nn.Module):
    """One recurrent layer; a child says how many gates it has and what it carries, and runs them.

    Args:
        input_size: width of the inputs.
        hidden_size: H, width of the outputs and of every slot of the state.
        num_heads: N, blocks of the recurrent matrix; divides H.
    """

    gates: int  # G
    slots: int  # S, of which the first is h, the output
    learnable_slots: int  # the first of them, whose values before the first token may be parameters
    matrices = ("input_weight", "recurrent_weight")  # for low-rank directions
    exact_state = False  # whether it is float32 at least, whatever the dtype of the weights
    other_slots: tuple[float, ...] = ()  # what the others hold before the first token then; without parameters 0

    input_weight: nn.Parameter
    recurrent_weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, input_size: int, hidden_size: int, num_heads: int = 1):
        super().__init__()
        for name, shape in self.shapes(input_size, hidden_size, num_heads).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    @classmethod
    def shapes(cls, input_size: int, hidden_size: int, num_heads: int) -> dict[str, tuple[int, ...]]:
        """The parameters and their shapes."""
        head_size = hidden_size // num_heads
        return {
            "input_weight": (cls.gates * hidden_size, input_size),
            "recurrent_weight": (cls.gates, num_heads, head_size, head_size),
            "bias": (cls.gates * hidden_size,),
        }

    def reset_parameters(self) -> None:
        """Uniform in ±1/√H, as torch."""
        bound = (self.bias.numel() // self.gates) ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, inputs: Tensor, state: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs (B, T, H) and final state (B, S, H).

        Args:
            inputs: (B, T, input_size).
            state: (B, S, H), before the first token; not modified.
            real: (B, T) booleans, where False holds the state; None if all tokens are real.
        """
        raise NotImplementedError
