"""Text that every machine has, and the way from text to blocks of tokens.

References:
    Radford, Wu, Child, Luan, Amodei, Sutskever: Language Models are Unsupervised Multitask Learners. 2019, section 2.2
    (text as bytes, each shown as one printable character).
"""

import math
from itertools import accumulate, chain
from pydoc_data.topics import topics
from typing import TypeVar

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


END_OF_TEXT = "<|endoftext|>"

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
        dataset: rows with a column `text`, or else with text in their first column; a streaming dataset stays one.
        block_size: in tokens.
        num_proc, load_from_cache_file: as in `Dataset.map`; a streaming dataset has no use for them.
    """
    if block_size < 1:
        raise ValueError(f"`block_size` must be at least 1, got {block_size}.")
    columns = _columns(dataset)
    text = "text" if "text" in columns else columns[0]

    def cut(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        # verbose=False: a text longer than the model's context is no mistake here, it will be cut
        ids = list(chain.from_iterable(tokenizer(rows[text], verbose=False)["input_ids"]))
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
    """`loss`, in nats a token, as bits for each UTF-8 byte of the text in `blocks`: comparable between tokenizers."""
    rows = [row["input_ids"] for row in blocks]
    tokens_per_byte = sum(map(len, rows)) / sum(len(text.encode()) for text in tokenizer.batch_decode(rows))
    return loss / math.log(2) * tokens_per_byte


def _columns(dataset: AnyDataset) -> list[str]:
    split = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
    return split.column_names or list(next(iter(split)))  # a stream may not know its columns before its first row
