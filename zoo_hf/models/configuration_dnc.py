"""Configuration of the language model with a simplified DNC."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class DNCConfig(PreTrainedConfig):
    r"""Sizes of a language model with a simplified DNC: an LSTM with a memory of N slots that it addresses by content.

    The defaults make a byte model of 42 k parameters. `DNCConfig.preset(scale)` gives the sizes that were published.

    Args:
        vocab_size (`int`, defaults to 256):
            Number of tokens V; 256 is one token a byte.
        embedding_size (`int`, defaults to 32):
            Width E of the token embedding, which the LSTM reads beside what was read from the memory.
        hidden_size (`int`, defaults to 32):
            Units H of the LSTM. It keeps 2H numbers a sequence.
        memory_slots (`int`, defaults to 32):
            Slots N of the memory, N·W numbers a sequence. No parameter depends on it.
        memory_width (`int`, defaults to 32):
            Numbers W in a slot, and in what is read. `head_size` is the same field.
        initial_memory (`float`, defaults to 0.0):
            Size of the numbers in the memory before the first token, a fixed pattern that gives each slot an address
            of its own; 0.1 is a good one. At 0, as published, all slots stay equal for ever, and the keys have no
            effect: what is equal is read and written equally.
        chunk_length (`int`, defaults to 1024):
            Tokens that a forward pass runs at a time; longer sequences are run in chunks that hand on the state. With
            `labels` the head and the loss follow chunk by chunk, so that memory does not grow with the context.
        tie_word_embeddings (`bool`, defaults to `False`):
            Whether the head's weight is the embedding's (its bias is its own). Needs `embedding_size` equal to
            `hidden_size + memory_width`.
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
    >>> from zoo_hf.models import DNCConfig, DNCForCausalLM

    >>> model = DNCForCausalLM(DNCConfig.preset(1))
    >>> model.num_parameters()
    303589
    ```
    """

    model_type = "zoo_dnc"
    attribute_map = {"head_size": "memory_width"}
    keys_to_ignore_at_inference = ["state"]

    vocab_size: int = 256
    embedding_size: int = 32
    hidden_size: int = 32
    memory_slots: int = 32
    memory_width: int = 32
    initial_memory: float | int = 0.0
    chunk_length: int = 1024
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def preset(cls, scale: int, **fields: Any) -> "DNCConfig":
        """The published model of a scale, 1, 2, 4, …, 64: all widths and the slots 128·scale, 100 tokens.

        Args:
            scale: any positive whole number.
            fields: what else is to differ from the defaults; replaces the preset's own.
        """
        if scale < 1:
            raise ValueError(f"`scale` must be at least 1, got {scale}.")
        size = 128 * scale
        sizes = dict.fromkeys(("embedding_size", "hidden_size", "memory_slots", "memory_width"), size)
        return cls(**({"vocab_size": 100} | sizes | fields))

    def __post_init__(self, **kwargs: Any) -> None:
        sizes = {
            "vocab_size": self.vocab_size,
            "embedding_size": self.embedding_size,
            "hidden_size": self.hidden_size,
            "memory_slots": self.memory_slots,
            "memory_width": self.memory_width,
            "chunk_length": self.chunk_length,
        }
        for name, size in sizes.items():
            if size <= 0:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        if self.tie_word_embeddings and self.embedding_size != self.hidden_size + self.memory_width:
            raise ValueError(
                f"`tie_word_embeddings` needs `embedding_size` equal to `hidden_size + memory_width`, got "
                f"{self.embedding_size} and {self.hidden_size + self.memory_width}; make them equal or set "
                "`tie_word_embeddings=False`."
            )
        super().__post_init__(**kwargs)


__all__ = ["DNCConfig"]
