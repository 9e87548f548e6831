"""Texts and tokens to train on, as `datasets` objects."""

from .text import bits_per_byte, byte_tokenizer, python_documentation, token_blocks


__all__ = ["bits_per_byte", "byte_tokenizer", "python_documentation", "token_blocks"]
