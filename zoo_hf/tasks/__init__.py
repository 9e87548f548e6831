"""Texts and tokens to train on, as `datasets` objects, and what to measure on them."""

from .accuracy import likeliest_tokens, next_token_accuracy
from .streams import text_streams
from .text import bits_per_byte, byte_tokenizer, python_documentation, token_blocks


__all__ = [
    "bits_per_byte",
    "byte_tokenizer",
    "likeliest_tokens",
    "next_token_accuracy",
    "python_documentation",
    "text_streams",
    "token_blocks",
]
