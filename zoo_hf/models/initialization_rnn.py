"""Initial weights of the recurrent language models, by name. Letters: H hidden units, D units of a head."""

from collections.abc import Callable

from torch import nn

from .configuration_rnn import RNNConfig
from .recurrent_layer import RecurrentLayer


def torch_initialization_(module: nn.Module, config: RNNConfig) -> None:
    """Uniform in ±1/√H, as `torch.nn`; embedding normal, of variance 1, or 1/H where it is the head too."""
    if isinstance(module, RecurrentLayer):
        module.reset_parameters()
    elif isinstance(module, nn.Linear):
        bound = module.in_features**-0.5
        for parameter in module.parameters():
            nn.init.uniform_(parameter, -bound, bound)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=config.hidden_size**-0.5 if config.tie_word_embeddings else 1.0)


def paper_initialization_(module: nn.Module, config: RNNConfig) -> None:
    """Normal: W_in of variance 1/(its width), R and head of variance 1/D, embedding of variance 1; biases zero.

    References:
        Francois Chaubard, Mykel Kochenderfer, "Scaling Recurrent Neural Networks to a Billion Parameters with
        Zero-Order Optimization", 2025, arXiv:2505.17852.
    """
    head_size = config.hidden_size // config.num_heads
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=head_size**-0.5 if config.tie_word_embeddings else 1.0)
    elif isinstance(module, RecurrentLayer | nn.Linear):
        parameters = dict(module.named_parameters())
        is_head = isinstance(module, nn.Linear) and "bias" in parameters  # a feed-forward network has no biases
        for name, parameter in parameters.items():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                inputs = head_size if is_head else parameter.shape[-1]  # W_in's width, R's D
                nn.init.normal_(parameter, std=inputs**-0.5)


INITIALIZATIONS: dict[str, Callable[[nn.Module, RNNConfig], None]] = {
    "torch": torch_initialization_,
    "paper": paper_initialization_,
}
