"""How well a model predicts a text: every token once, each after the tokens before it that its window holds.

Letters: W windows, T tokens a window, V tokens in the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..tasks import TextLoss
from .mistake import Mistake
from .model import longest_context


LONGEST = 1024  # tokens of a window, where the model's context is longer or has no end


def score(model: Any, tokenizer: Any, text: str, *, window: int, batch_size: int) -> dict[str, float]:
    """Loss in nats a token, perplexity and bits per byte of a text.

    Args:
        window: tokens that a window predicts at most; see `nats`.
        batch_size: windows in a forward pass.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    found = nats(model, ids, first_token(tokenizer), window=window, batch_size=batch_size)
    metric = TextLoss(keep_in_memory=True)  # processes that share a file would wait for each other
    return metric.compute(predictions=[found.tolist()], references=[text])


def nats(model: Any, ids: list[int], first: int, *, window: int, batch_size: int) -> Tensor:
    """−ln p of every token, (len(ids)).

    Windows follow each other without a gap and begin with the token before them, `first` before the text. The last
    one begins earlier where the text would end within it, and only its last tokens are counted: the windows are those
    of lm-eval's `loglikelihood_rolling`.
    """
    size = min(window, len(ids))
    whole, rest = divmod(len(ids), size)
    starts = [*range(0, whole * size, size), *([len(ids) - size] if rest else [])]
    tokens = torch.tensor([first, *ids])
    rows = torch.stack([tokens[start : start + size + 1] for start in starts])  # (W, T + 1)
    found = torch.cat([nats_of_rows(model.eval(), batch) for batch in rows.split(batch_size)])  # (W, T)
    return torch.cat([found[:whole].flatten(), *([found[-1, -rest:]] if rest else [])])


@torch.inference_mode()
def nats_of_rows(model: Any, rows: Tensor) -> Tensor:
    """−ln p of all tokens of each row but its first, (W, T) from (W, T + 1)."""
    rows = rows.to(model.device)
    logits = model(rows[:, :-1]).logits.float()  # (W, T, V)
    return cross_entropy(logits.mT, rows[:, 1:], reduction="none").double().cpu()


def first_token(tokenizer: Any) -> int:
    """What the first token of a text is predicted from."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise Mistake("The tokenizer has no token for the beginning or the end of a text: nothing predicts the first one.")


def window_of(model: Any, asked: int | None) -> int:
    """Tokens of a window: those asked for, or the model's context up to `LONGEST`."""
    longest = longest_context(model)
    if asked is None:
        return int(min(longest, LONGEST))
    if not 1 <= asked <= longest:
        raise Mistake(f"--window must be at least 1 and at most the model's {longest} tokens, got {asked}.")
    return asked
