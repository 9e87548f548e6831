"""Texts lose nothing on their way to tokens, and blocks are the text, cut."""

import math
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, EvalPrediction, PreTrainedTokenizerFast

from zoo_hf.tasks import (
    bits_per_byte,
    byte_tokenizer,
    likeliest_tokens,
    next_token_accuracy,
    python_documentation,
    token_blocks,
)


TEXTS = [
    "",
    "plain text,  with  spaces .  And isn't it ?",
    "  leading and trailing \n\t\r\n ",
    "é ñ ß ü \u0301\u00a0\u00ad\ufeff\u2028",
    "漢字かな交じり文 한국어 العربية",
    "🙂👩‍👩‍👧 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "\0 a NUL, \x01\x1b[0m control characters \x7f",
    "Ā Ġ Ċ ĉ ÿ ¡ are the letters that byte tokenizers write for bytes",
    "<|endoftext|",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_becomes_its_utf8_bytes_and_back(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text


def test_the_tokenizer_has_256_tokens_one_of_which_ends_a_text():
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == tokenizer.vocab_size == 256
    assert sorted(tokenizer.get_vocab().values()) == list(range(256))
    assert tokenizer("a<|endoftext|>b")["input_ids"] == [ord("a"), 255, ord("b")]
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert special == (255, 255, 255, 255)
    assert tokenizer.decode([ord("a"), 255], skip_special_tokens=True) == "a"


def test_padding_goes_to_the_left_where_it_does_not_part_the_prompt_from_its_answer():
    batch = byte_tokenizer()(["abc", "a"], padding=True)
    assert batch["input_ids"] == [[97, 98, 99], [255, 255, 97]]
    assert batch["attention_mask"] == [[1, 1, 1], [0, 0, 1]]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == list(text.encode("utf-8"))
        assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.padding_side) == (255, 255, "left")


def test_the_training_text_is_the_start_of_the_topics_in_the_order_of_their_names():
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    train = "".join(python_documentation()["train"]["text"])
    assert whole.startswith(train)
    assert len(train) / len(whole) == pytest.approx(0.95, abs=0.02)
    assert len(train) > 400_000


def test_no_paragraph_is_in_both_splits():
    splits = python_documentation(validation_percentage=20)
    words = {name: {tuple(text.split()) for text in split["text"]} for name, split in splits.items()}
    assert not words["train"] & words["validation"]


def test_a_larger_validation_share_leaves_less_to_train_on():
    lengths = [sum(map(len, python_documentation(share)["train"]["text"])) for share in (5, 10, 50)]
    assert lengths[0] > lengths[1] > lengths[2]


@pytest.mark.parametrize("share", [0, 100, -1])
def test_a_share_that_leaves_a_split_empty_is_refused(share):
    with pytest.raises(ValueError, match=f"`validation_percentage` must be above 0 and below 100, got {share}"):
        python_documentation(share)


@pytest.fixture
def rows():
    return Dataset.from_dict({"id": [0, 1, 2], "text": ["abcde", "", "fghijkl"]})


def test_blocks_joined_are_the_text_up_to_the_last_whole_block(rows):
    blocks = token_blocks(rows, byte_tokenizer(), 5)
    assert blocks.column_names == ["input_ids", "labels"]
    assert [bytes(block).decode() for block in blocks["input_ids"]] == ["abcde", "fghij"]
    assert blocks["labels"][:] == blocks["input_ids"][:]


def test_a_stream_gives_the_same_blocks(rows):
    blocks = token_blocks(rows.to_iterable_dataset(), byte_tokenizer(), 5)
    assert list(blocks) == list(token_blocks(rows, byte_tokenizer(), 5))


def test_a_stream_of_unknown_columns_gives_the_same_blocks(rows):
    stream = rows.to_iterable_dataset().map(lambda row: row)  # datasets cannot know what a function returns
    assert stream.column_names is None
    assert list(token_blocks(stream, byte_tokenizer(), 5)) == list(token_blocks(rows, byte_tokenizer(), 5))


def test_without_a_column_text_the_first_column_is_the_text(rows):
    renamed = rows.remove_columns("id").rename_column("text", "content")
    assert token_blocks(renamed, byte_tokenizer(), 4)["input_ids"][0] == list(b"abcd")


def test_every_split_is_cut():
    blocks = token_blocks(python_documentation(), byte_tokenizer(), 64)
    assert set(blocks) == {"train", "validation"}
    assert {len(block) for split in blocks.values() for block in split["input_ids"]} == {64}


def test_a_text_shorter_than_a_block_gives_no_block(rows):
    assert len(token_blocks(rows, byte_tokenizer(), 13)) == 0


def test_a_block_size_below_one_is_refused(rows):
    with pytest.raises(ValueError, match="`block_size` must be at least 1, got 0"):
        token_blocks(rows, byte_tokenizer(), 0)


@pytest.mark.parametrize("missing", ["", None])
def test_a_row_without_text_adds_nothing(missing):
    rows = Dataset.from_dict({"text": ["abc", missing, "def"]})
    assert token_blocks(rows, byte_tokenizer(), 6)["input_ids"][:] == [list(b"abcdef")]


def test_a_column_without_text_is_refused():
    rows = Dataset.from_dict({"id": [7], "content": ["abc"]})
    with pytest.raises(ValueError, match="Column `id` must hold text, not 7: give the text's the name `text`"):
        token_blocks(rows, byte_tokenizer(), 2)


def test_a_dataset_without_rows_and_columns_is_refused(rows):
    for empty in (Dataset.from_dict({}), rows.to_iterable_dataset().map(lambda row: row).take(0)):
        with pytest.raises(ValueError, match="`dataset` has neither rows nor columns"):
            token_blocks(empty, byte_tokenizer(), 2)


NON_ASCII = "naïve: 漢字かな, ß𝔘🙂 and é. " * 5


def byte_level_pairs():
    """A tokenizer with merges of bytes, also of parts of characters, and with its bytes' letters for each token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([NON_ASCII], trainer)
    byte = {token: id for token, id in byte_tokenizer().get_vocab().items() if len(token) == 1}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer), lambda name: bytes(byte[letter] for letter in name)


def sentencepiece_bytes():
    """A tokenizer that names spaces, and has tokens of single bytes for the letters that it does not know."""
    names = ["▁", "▁a", "n", "d", "▁and", ":", ",", "."] + [f"<0x{byte:02X}>" for byte in range(256)]
    merges = [("▁", "a"), ("n", "d"), ("▁a", "nd")]
    vocabulary = {name: id for id, name in enumerate([*names, "nd", "a"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)

    def spelt(name):
        return bytes([int(name[1:-1], 16)]) if name.startswith("<0x") else name.replace("▁", " ").encode()

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer), spelt


@pytest.mark.parametrize("make", [byte_level_pairs, sentencepiece_bytes])
@pytest.mark.parametrize("block_size", [2, 3, 5, 7, 64])
def test_bits_are_divided_among_the_bytes_of_the_predicted_tokens(make, block_size):
    tokenizer, spelt = make()
    blocks = token_blocks(Dataset.from_dict({"text": [NON_ASCII]}), tokenizer, block_size)
    names = [tokenizer.convert_ids_to_tokens(row) for row in blocks["input_ids"][:]]
    text = b"".join(spelt(name) for row in names for name in row)
    assert NON_ASCII.encode().startswith(text.removeprefix(b" ")), "the names are those of the text"
    size = sum(len(spelt(name)) for row in names for name in row[1:])
    predicted = sum(len(row) - 1 for row in names)
    assert bits_per_byte(math.log(2) * size, blocks, tokenizer) == pytest.approx(predicted, rel=1e-12)


@pytest.mark.parametrize("block_size", [2, 3, 4, 5])
def test_a_byte_of_a_byte_tokenizer_is_a_byte_wherever_a_block_ends(block_size):
    blocks = token_blocks(Dataset.from_dict({"text": ["é漢🙂" * 9]}), byte_tokenizer(), block_size)
    assert bits_per_byte(math.log(256), blocks, byte_tokenizer()) == pytest.approx(8, rel=1e-12)


def test_words_count_with_the_space_before_them():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "bc": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    blocks = token_blocks(Dataset.from_dict({"text": ["a bc a bc"]}), words, 4)
    assert bits_per_byte(math.log(2), blocks, words) == pytest.approx(3 / len(" bc a bc"))


def test_special_tokens_cost_bits_and_spell_nothing():
    blocks = token_blocks(Dataset.from_dict({"text": ["ab<|endoftext|>"]}), byte_tokenizer(), 3)
    assert bits_per_byte(math.log(2), blocks, byte_tokenizer()) == pytest.approx(2)


@pytest.mark.parametrize("rows", [[], [[97]], [[97, 255]]])
def test_bits_for_no_byte_are_refused(rows):
    with pytest.raises(ValueError, match="`blocks` hold no predicted text"):
        bits_per_byte(1.0, Dataset.from_dict({"input_ids": rows}), byte_tokenizer())


def test_accuracy_is_the_share_of_next_tokens_that_are_the_likeliest():
    labels = np.array([[1, 2, 3, 4], [5, 6, -100, 8]])
    guessed = np.array([[2, 3, 0, 9], [0, -100, 8, 9]])  # right: 2, 3 and 8; -100 is no token to guess
    assert next_token_accuracy(EvalPrediction(guessed, labels)) == {"accuracy": 3 / 5}


@pytest.mark.parametrize("beside", [(), (torch.zeros(2, 3),)])
def test_the_likeliest_tokens_stand_for_the_logits(beside):
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    for outputs in (logits, (logits, *beside)):
        assert torch.equal(likeliest_tokens(outputs, torch.zeros(2, 5)), logits.max(dim=-1).indices)
