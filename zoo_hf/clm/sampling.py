"""What a model writes."""

from typing import Any

import torch

from .mistake import Mistake
from .model import longest_context


def written(model: Any, tokenizer: Any, prompt: str, tokens: int, *, seed: int, **how: Any) -> str:
    """The prompt and what the model writes after it, unprintable characters as dots. No generator is advanced.

    Args:
        tokens: how many at most.
        how: further arguments of `generate`.

    Raises:
        Mistake: the prompt is empty, or leaves no room in the model's context.
    """
    model.eval()
    given = tokenizer(prompt, return_tensors="pt").to(model.device)
    length = given["input_ids"].shape[1]
    if not length:
        raise Mistake("The prompt is empty: give at least one character.")
    if length + tokens > longest_context(model):
        raise Mistake(
            f"A prompt of {length} tokens and {tokens} more are longer than the model's context of "
            f"{longest_context(model)}: shorten one of them."
        )
    how = {"do_sample": True, "pad_token_id": tokenizer.pad_token_id} | how
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = model.generate(**given, max_new_tokens=tokens, use_cache=True, **how)[0]
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in tokenizer.decode(text))
