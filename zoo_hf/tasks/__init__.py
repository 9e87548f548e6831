"""Texts and tokens to train on, as `datasets` objects, and what to measure on them."""

from .accuracy import answer_accuracy, likeliest_tokens, next_token_accuracy
from .streams import text_streams
from .text import bits_per_byte, byte_tokenizer, python_documentation, token_blocks
from .text_loss import TextLoss, perplexity
from .transduction import TASKS, character_tokenizer, transduction


__all__ = [
    "TASKS",
    "TextLoss",
    "answer_accuracy",
    "bits_per_byte",
    "byte_tokenizer",
    "character_tokenizer",
    "likeliest_tokens",
    "next_token_accuracy",
    "perplexity",
    "python_documentation",
    "text_streams",
    "token_blocks",
    "transduction",
]
