"""Documents as parallel streams of windows: row b of a batch goes on where row b of the batch before ended."""

from collections.abc import Iterable, Iterator
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase


Window = dict[str, Any]


def text_streams(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, window: int, *, batch_size: int
) -> Dataset:
    """Windows of text for training with `carry_state`, in the order in which they must be read.

    Example b, b + batch_size, b + 2 · batch_size, … are one stream: a document from beginning to end, then the next
    that no stream has begun. A document's last window is padded, so that documents begin with a window. It ends where
    a stream finds no document any more; what the others still had is left out.

    Columns: `input_ids`, `attention_mask` and `labels` (−100 for padding), `window` numbers each, and `starts`,
    whether a document begins here. The first token of a window is not predicted.

    Args:
        documents: texts; empty ones are passed over.
        window: tokens.
        batch_size: streams, and rows of a batch on its device.

    Raises:
        ValueError: there are fewer documents than streams.
    """
    if window < 2 or batch_size < 1:
        raise ValueError(f"`window` must be at least 2 and `batch_size` 1, got {window} and {batch_size}.")
    waiting = (_windows(ids, window, tokenizer) for ids in _tokens(documents, tokenizer))
    rows = list(_interleaved(waiting, batch_size))
    if not rows:
        raise ValueError(f"Fewer documents than `batch_size`={batch_size}: split them, or lower it.")
    return Dataset.from_list(rows)


def _tokens(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    for document in documents:
        if ids := tokenizer(document, verbose=False)["input_ids"]:
            yield ids


def _windows(ids: list[int], window: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[Window]:
    padding = tokenizer.pad_token_id or 0
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        missing = window - len(part)
        yield {
            "input_ids": part + [padding] * missing,
            "attention_mask": [1] * len(part) + [0] * missing,
            "labels": part + [-100] * missing,
            "starts": start == 0,
        }


def _interleaved(waiting: Iterator[Iterator[Window]], batch_size: int) -> Iterator[Window]:
    """One window of every stream, then the next of every stream, until one finds no more."""
    streams: list[Iterator[Window]] = [iter(()) for _ in range(batch_size)]
    while True:
        batch = []
        for place, stream in enumerate(streams):
            following = next(stream, None)
            if following is None:
                if (document := next(waiting, None)) is None:
                    return
                streams[place], following = document, next(document)
            batch.append(following)
        yield from batch
