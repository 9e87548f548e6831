"""Configuration of the recurrent language models (LSTM, GRU)."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


CELL_TYPES = ("lstm", "gru")


@strict
class RNNConfig(PreTrainedConfig):
    r"""Sizes and choices of a recurrent language model: embedding, stacked recurrent layers, linear head with a bias.

    The defaults make a character model of 25 k parameters for bytes.

    Args:
        cell_type (`str`, defaults to `"lstm"`):
            The recurrence of every layer, `"lstm"` or `"gru"`, both with torch's equations and gate order.
        vocab_size (`int`, defaults to 256):
            Number of tokens V; 256 is one token a byte.
        embedding_size (`int`, defaults to 32):
            Width E of the token embedding, the input of the first layer.
        hidden_size (`int`, defaults to 32):
            Width H of every layer and of the head's input. A layer keeps H numbers a sequence for GRU, 2H for LSTM.
        num_layers (`int`, defaults to 1):
            Number of stacked layers; each reads the outputs of the one below. `num_hidden_layers` is the same field.
        num_heads (`int`, defaults to 1):
            Blocks of the recurrent matrix: units talk across time only within their head, so that a gate has
            H²/num_heads recurrent weights. Must divide `hidden_size`. One head is the ordinary LSTM or GRU, and the
            only choice with torch's fused kernel.
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
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_cell_type()
        self._check_sizes()
        super().__post_init__(**kwargs)

    def _check_cell_type(self) -> None:
        if self.cell_type not in CELL_TYPES:
            raise ValueError(f"`cell_type` must be one of {', '.join(CELL_TYPES)}, got {self.cell_type!r}.")

    def _check_sizes(self) -> None:
        sizes = {
            "vocab_size": self.vocab_size,
            "embedding_size": self.embedding_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
        }
        for name, size in sizes.items():
            if size <= 0:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        if self.hidden_size % self.num_heads != 0:
            raise ValueError(
                f"`num_heads` must divide `hidden_size`, got {self.num_heads} and {self.hidden_size}; take a divisor."
            )
        if self.tie_word_embeddings and self.embedding_size != self.hidden_size:
            raise ValueError(
                f"`tie_word_embeddings` needs `embedding_size` equal to `hidden_size`, got {self.embedding_size} and "
                f"{self.hidden_size}; make them equal or set `tie_word_embeddings=False`."
            )


__all__ = ["RNNConfig"]
