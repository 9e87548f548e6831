"""Texts lose nothing on their way to tokens, and blocks are the text, cut."""

import math
from pydoc_data.topics import topics

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from zoo_hf.tasks import bits_per_byte, byte_tokenizer, python_documentation, token_blocks


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


def test_a_nat_a_token_is_as_many_bits_a_byte_as_the_tokens_are_bytes_long(rows):
    blocks = token_blocks(rows, byte_tokenizer(), 5)
    assert bits_per_byte(math.log(256), blocks, byte_tokenizer()) == pytest.approx(8)
    twice = Dataset.from_dict({"input_ids": [[*"é".encode(), *b"ab"]]})

    class Halves:
        """A tokenizer whose tokens are two bytes long."""

        def batch_decode(self, rows):
            return ["ab" * len(tokens) for tokens in rows]

    assert bits_per_byte(math.log(256), twice, Halves()) == pytest.approx(4)
