"""Text that every machine has, and the way from text to blocks of tokens.

References:
    Radford, Wu, Child, Luan, Amodei, Sutskever: Language Models are Unsupervised Multitask Learners. 2019, section 2.2
    (text as bytes, each shown as one printable character).
"""

import math
import re
from functools import partial
from itertools import accumulate, chain
from pydoc_data.topics import topics
from typing import Any, TypeVar

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


END_OF_TEXT = "<|endoftext|>"
_BYTE = re.compile("<0x[0-9A-F]{2}>$")  # how SentencePiece names the tokens of single bytes

AnyDataset = TypeVar("AnyDataset", Dataset, DatasetDict, IterableDataset, IterableDatasetDict)


def python_documentation(validation_percentage: float = 5.0) -> DatasetDict:
    """CPython's own documentation, as `help()` shows it: a `train` and a `validation` split with one column, `text`.

    The topics are joined in the order of their names, half a million characters in all (each version of Python ships
    its own text), and cut once: the last `validation_percentage` of the characters are the validation text. Topics
    quote each other; a paragraph of the validation text that the training text has as well is left out, so that no
    loss is measured on a sentence that was trained on. The end of the text holds more tables and is easier to predict
    than the rest (given one character, the next costs 2.2 nats there and 2.5 on average), so that a validation loss
    may lie below the training loss. A row is a paragraph with the empty line after it: the rows of a split, joined
    without a separator, are its text.
    """
    if not 0 < validation_percentage < 100:
        raise ValueError(f"`validation_percentage` must be above 0 and below 100, got {validation_percentage}.")
    text = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = [paragraph + "\n\n" for paragraph in text.split("\n\n")]
    end_of_training = len(text) * (1 - validation_percentage / 100)
    cut = sum(end <= end_of_training for end in accumulate(map(len, paragraphs)))
    trained_on = {_words(paragraph) for paragraph in paragraphs[:cut]}
    unseen = [paragraph for paragraph in paragraphs[cut:] if _words(paragraph) not in trained_on]
    return DatasetDict(
        train=Dataset.from_dict({"text": paragraphs[:cut]}),
        validation=Dataset.from_dict({"text": unseen}),
    )


def _words(paragraph: str) -> tuple[str, ...]:
    # quoted paragraphs are indented and wrapped anew
    return tuple(paragraph.split())


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 256 tokens, one a byte: a token's id is the value of its UTF-8 byte. Decoding restores any text.

    The byte 0xFF, which UTF-8 never uses, gives its place to `<|endoftext|>`: beginning, end, padding and unknown.
    """
    vocabulary = {character: byte for byte, character in enumerate(_printable_bytes())}
    vocabulary = {END_OF_TEXT if byte == 0xFF else character: byte for character, byte in vocabulary.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",  # the last state of a batch is then that of each text's last token
    )


def _printable_bytes() -> list[str]:
    """The character that shows each byte: itself where Latin-1 prints it, else the next one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def token_blocks(
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    num_proc: int | None = None,
    load_from_cache_file: bool = True,
) -> AnyDataset:
    """`dataset` tokenised and cut into rows of exactly `block_size` tokens, with `input_ids` and equal `labels`.

    Rows are joined without a separator, a thousand at a time; what is left of a thousand after its last whole block
    is dropped.

    Args:
        dataset: rows with a column `text`, or else with text in their first column; a missing text is an empty one. A
            streaming dataset stays one.
        tokenizer: its special tokens are added to each row, if it adds any.
        block_size: in tokens.
        num_proc, load_from_cache_file: as in `Dataset.map`; a streaming dataset has no use for them.
    """
    if block_size < 1:
        raise ValueError(f"`block_size` must be at least 1, got {block_size}.")
    columns = _columns(dataset)
    text = "text" if "text" in columns else columns[0]

    def cut(rows: dict[str, list[str | None]]) -> dict[str, list[list[int]]]:
        texts = ["" if row is None else row for row in rows[text]]  # an empty cell of a table is None
        for row in texts:
            if not isinstance(row, str):
                raise ValueError(f"Column `{text}` must hold text, not {row!r}: give the text's the name `text`.")
        # verbose=False: a text longer than the model's context is no mistake here, it will be cut
        ids = list(chain.from_iterable(tokenizer(texts, verbose=False)["input_ids"]))
        blocks = [ids[start : start + block_size] for start in range(0, len(ids) - block_size + 1, block_size)]
        return {"input_ids": blocks, "labels": [block.copy() for block in blocks]}

    if isinstance(dataset, (IterableDataset, IterableDatasetDict)):
        return dataset.map(cut, batched=True, remove_columns=columns)
    return dataset.map(
        cut,
        batched=True,
        remove_columns=columns,
        num_proc=num_proc,
        load_from_cache_file=load_from_cache_file,
        desc=f"Cutting into blocks of {block_size} tokens",
    )


def bits_per_byte(loss: float, blocks: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase) -> float:
    """`loss`, in nats a token, as bits for each UTF-8 byte of the text predicted: comparable between tokenizers.

    All tokens of a block but its first are predicted. Special tokens cost bits and spell no byte.

    Args:
        loss: mean over all predicted tokens of `blocks`.
        blocks: rows of `input_ids`, as `token_blocks` makes them.
    """
    rows = [row["input_ids"] for row in blocks]
    predicted = list(chain.from_iterable(row[1:] for row in rows))
    size = _bytes(predicted, rows[0][:1], tokenizer) if predicted else 0
    if not size:
        raise ValueError("`blocks` hold no predicted text: give at least one block of two or more tokens.")
    return loss / math.log(2) * len(predicted) / size


def _bytes(ids: list[int], before: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes that tokens spell, also where they end, or start, within a character; `before` stands before them.

    A token of a byte-level tokenizer is counted by its own bytes. Others are decoded all at once, as some spell a
    space only between others, but for tokens of a single byte, which have a name like <0xE9>.
    """
    if tokenizer.is_fast and isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        added = tokenizer.added_tokens_decoder  # their names are text, all others' have a character for each byte
        lengths = {id: 0 if token.special else len(token.content.encode()) for id, token in added.items()}
        names = tokenizer.convert_ids_to_tokens(ids)
        return sum(lengths.get(id, len(name)) for id, name in zip(ids, names, strict=True))
    texts = [id for id, name in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True) if not _BYTE.match(name)]
    # `before` stays in its place while decoding, as decoders drop a space that nothing stands before
    decode: Any = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(ids) - len(texts) + len(decode(before + texts).encode()) - len(decode(before).encode())


def _columns(dataset: AnyDataset) -> list[str]:
    split = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
    # a stream may not know its columns before its first row
    columns = split.column_names or list(next(iter(split), {}))
    if not columns:
        raise ValueError("`dataset` has neither rows nor columns: there is no text to cut.")
    return columns
