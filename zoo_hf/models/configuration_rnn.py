"""Configuration of the recurrent language models (LSTM, GRU, sLSTM, Elman)."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


CELL_TYPES = ("lstm", "gru", "slstm", "elman")
POOLINGS = ("none", "attention")
INITIALIZATIONS = ("torch", "paper")

# H, heads: the LSTMs of arXiv:2505.17852, named after their number of parameters
PRESETS = {
    "100k": (240, 12),
    "1M": (1600, 32),
    "10M": (9600, 64),
    "100M": (66000, 220),
    "1.1B": (297500, 350),
    "4.5B": (1000000, 1000),
}


@strict
class RNNConfig(PreTrainedConfig):
    r"""Sizes and choices of a recurrent language model: embedding, stacked recurrent layers, linear head with a bias.

    The defaults make a character model of 25 k parameters for bytes. `RNNConfig.preset` has the sizes of a paper.

    Args:
        cell_type (`str`, defaults to `"lstm"`):
            The recurrence of every layer: `"lstm"` or `"gru"`, with torch's equations and gate order, `"slstm"`, the
            LSTM with exponential input gate of xLSTM, or `"elman"`, one tanh.
        vocab_size (`int`, defaults to 256):
            Number of tokens V; 256 is one token a byte.
        embedding_size (`int`, defaults to 32):
            Width E of the token embedding, the input of the first layer.
        hidden_size (`int`, defaults to 32):
            Width H of every layer, and of the head's input unless `pooling` says otherwise. Between tokens a layer
            keeps H numbers a sequence for GRU and Elman, 2H for LSTM, 4H for sLSTM.
        num_layers (`int`, defaults to 1):
            Number of stacked layers; each reads the outputs of the one below. `num_hidden_layers` is the same field.
        num_heads (`int`, defaults to 1):
            Blocks of the recurrent matrix: units talk across time only within their head, so that a gate has
            H²/num_heads recurrent weights. Must divide `hidden_size`. One head is the ordinary layer.
        residual (`bool`, defaults to `False`):
            Whether each layer is added to its input, x + layer(RMSNorm(x)), with a last RMSNorm before the head: for
            deep stacks. Needs `embedding_size == hidden_size`.
        intermediate_size (`int`, defaults to 0):
            Width of the feed-forward network x + W₂ gelu(W₁ RMSNorm(x)) after each residual layer; 0 for none.
        learn_initial_state (`bool`, defaults to `False`):
            Whether the state before the first token is a parameter (h, and c where there is one) or zero.
        pooling (`str`, defaults to `"none"`):
            What the head reads: `"none"`, the last layer's output at a token; `"attention"`, the average of the
            embedding and all layers' outputs, E + L·H wide, over that token and all before it, weighted by the
            softmax of learned scores.
        pooling_decay (`float`, defaults to 0.0):
            What a token's score in the pooling loses with every later token, in nats: 0 weighs a token by its score
            alone, however long ago it was; at 10 practically only the last token counts.
        initialization (`str`, defaults to `"torch"`):
            Initial weights. `"torch"`: layers and head uniform in ±1/√H, as `torch.nn` has it, embedding normal.
            `"paper"`, as arXiv:2505.17852 has it: all normal, the input's with standard deviation 1/√(its width), the
            recurrent and the head's with 1/√(units of a head), the embedding's with 1; biases zero.
        chunk_length (`int`, defaults to 1024):
            Tokens that a forward pass runs at a time; longer sequences are run in chunks that hand on the state. With
            `labels` the head and the loss follow chunk by chunk, so that memory does not grow with the context.
        tie_word_embeddings (`bool`, defaults to `False`):
            Whether the head's weight is the embedding's (its bias is its own). Needs `embedding_size == hidden_size`.
        use_cache (`bool`, defaults to `True`):
            Whether a forward pass returns the state after the last token. Its size does not depend on the context.
        pad_token_id (`int`, *optional*):
            Token that fills a batch up to one length. Only `attention_mask` decides what is padding.
        bos_token_id (`int`, *optional*):
            Token that starts a text.
        eos_token_id (`int` or `list[int]`, *optional*):
            Token or tokens that end a text and with it `generate()`.

    Example:

    ```python
    >>> from zoo_hf.models import RNNConfig, RNNForCausalLM

    >>> model = RNNForCausalLM(RNNConfig(cell_type="gru", hidden_size=128))
    >>> model.num_parameters()
    103168
    ```
    """

    model_type = "zoo_rnn"
    attribute_map = {"num_hidden_layers": "num_layers"}
    keys_to_ignore_at_inference = ["state"]

    cell_type: str = "lstm"
    vocab_size: int = 256
    embedding_size: int = 32
    hidden_size: int = 32
    num_layers: int = 1
    num_heads: int = 1
    residual: bool = False
    intermediate_size: int = 0
    learn_initial_state: bool = False
    pooling: str = "none"
    pooling_decay: float = 0.0
    initialization: str = "torch"
    chunk_length: int = 1024
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @property
    def output_size(self) -> int:
        """Width of what the head reads."""
        if self.pooling == "attention":
            return self.embedding_size + self.num_layers * self.hidden_size
        return self.hidden_size

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "RNNConfig":
        """The one-layer character LSTM with many heads of arXiv:2505.17852 that has about so many parameters.

        Args:
            name: `"100k"`, `"1M"`, `"10M"`, `"100M"`, `"1.1B"` or `"4.5B"`; exact counts stand in
                `docs/models/zoo_rnn.md`.
            overrides: any other field, such as `vocab_size` (100 otherwise).
        """
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}; take one of {', '.join(PRESETS)}.")
        hidden_size, num_heads = PRESETS[name]
        sizes = {"vocab_size": 100, "embedding_size": 100, "hidden_size": hidden_size, "num_heads": num_heads}
        return cls(**{**sizes, "learn_initial_state": True, "initialization": "paper", **overrides})

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_names()
        self._check_sizes()
        self._check_widths()
        super().__post_init__(**kwargs)

    def _check_names(self) -> None:
        for name, value, choices in (
            ("cell_type", self.cell_type, CELL_TYPES),
            ("pooling", self.pooling, POOLINGS),
            ("initialization", self.initialization, INITIALIZATIONS),
        ):
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")

    def _check_sizes(self) -> None:
        sizes = {
            "vocab_size": self.vocab_size,
            "embedding_size": self.embedding_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "chunk_length": self.chunk_length,
        }
        for name, size in sizes.items():
            if size <= 0:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        if self.hidden_size % self.num_heads != 0:
            raise ValueError(
                f"`num_heads` must divide `hidden_size`, got {self.num_heads} and {self.hidden_size}; take a divisor."
            )
        if self.intermediate_size < 0:
            raise ValueError(f"`intermediate_size` must be at least 0, got {self.intermediate_size}.")
        if self.intermediate_size > 0 and not self.residual:
            raise ValueError(
                f"`intermediate_size` needs `residual`, got {self.intermediate_size} without; set `residual=True`."
            )

    def _check_widths(self) -> None:
        if not 0 <= self.pooling_decay < math.inf:
            raise ValueError(f"`pooling_decay` must be at least 0 and finite, got {self.pooling_decay}.")
        if self.tie_word_embeddings and self.pooling != "none":
            raise ValueError(
                f"`tie_word_embeddings` needs a head as wide as the embedding, {self.embedding_size}, but with "
                f"`pooling` it is {self.output_size} wide; set `tie_word_embeddings=False`."
            )
        for name, needs in (("tie_word_embeddings", self.tie_word_embeddings), ("residual", self.residual)):
            if needs and self.embedding_size != self.hidden_size:
                raise ValueError(
                    f"`{name}` needs `embedding_size` equal to `hidden_size`, got {self.embedding_size} and "
                    f"{self.hidden_size}; make them equal or set `{name}=False`."
                )


__all__ = ["RNNConfig"]
