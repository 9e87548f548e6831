"""Sequences to sequences: answers are right, lengths as asked for, and answers are counted as they are written."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import DataCollatorForSeq2Seq, EvalPrediction

from zoo_hf import RNNConfig, RNNForCausalLM
from zoo_hf.tasks import TASKS, answer_accuracy, character_tokenizer, likeliest_tokens, transduction


ROWS, SHORTEST, LONGEST = 2000, 3, 8


def copied(question):
    return question[:-1]


def repeated(question):
    letters, times = re.fullmatch("([a-z]+)([1-4]) ", question).groups()
    return "".join(letters for _ in range(int(times)))


def reversed_letters(question):
    return "".join(reversed(question[:-1]))


def in_order(question):
    return "".join(letter * question.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz")


def summed(question):
    return str(sum(int(number) for number in re.fullmatch(r"(\d(?:\+\d)*)=", question)[1].split("+")))


RIGHT = {"copy": copied, "repeat_copy": repeated, "reverse": reversed_letters, "sort": in_order, "add": summed}


@pytest.fixture(scope="module", params=[*TASKS])
def task(request):
    return request.param


@pytest.fixture(scope="module")
def rows(task):
    return transduction(task, ROWS, shortest=SHORTEST, longest=LONGEST)


def test_every_answer_follows_from_its_question(task, rows):
    assert len(rows) == ROWS
    assert [row["answer"] for row in rows] == [RIGHT[task](question) for question in rows["question"]]


def test_lengths_are_uniform_between_the_limits(task, rows):
    lengths = [len(re.findall(r"\d" if task == "add" else "[a-z]", question)) for question in rows["question"]]
    assert set(lengths) == {*range(SHORTEST, LONGEST + 1)}
    variance = ((LONGEST - SHORTEST + 1) ** 2 - 1) / 12
    assert abs(np.mean(lengths) - (SHORTEST + LONGEST) / 2) < 4 * (variance / ROWS) ** 0.5


def test_symbols_are_uniform(task, rows):
    symbols = Counter("".join(re.findall(r"\d" if task == "add" else "[a-z]", "".join(rows["question"]))))
    kinds = 10 if task == "add" else 26
    total = symbols.total()
    assert len(symbols) == kinds
    error = (total * (1 / kinds) * (1 - 1 / kinds)) ** 0.5
    assert max(abs(count - total / kinds) for count in symbols.values()) < 4 * error


def test_an_answer_is_repeated_one_to_four_times_and_as_often_each():
    times = Counter(question[-2] for question in transduction("repeat_copy", ROWS)["question"])
    assert set(times) == set("1234")
    assert max(abs(count - ROWS / 4) for count in times.values()) < 4 * (ROWS * 3 / 16) ** 0.5


def test_the_answer_and_the_end_are_labelled_and_the_question_is_not(rows):
    end = character_tokenizer().eos_token_id
    for row in rows:
        questions = len(row["question"])
        assert row["labels"] == [-100] * questions + row["input_ids"][questions:]
        assert len(row["input_ids"]) == questions + len(row["answer"]) + 1
        assert row["input_ids"].index(end) == len(row["input_ids"]) - 1


def test_tokens_spell_the_question_and_the_answer(rows):
    tokenizer = character_tokenizer()
    for row in rows.select(range(100)):
        spelt = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        assert spelt == row["question"] + row["answer"]


def test_the_tokenizer_has_40_tokens_and_pads_on_the_left():
    tokenizer = character_tokenizer()
    assert len(tokenizer) == 40
    text = "abcdefghijklmnopqrstuvwxyz0123456789 +="
    assert tokenizer(text)["input_ids"] == [*range(1, 40)]
    assert tokenizer.decode([*range(1, 40)]) == text
    assert tokenizer("aßb")["input_ids"] == [1, 0, 2], "an unknown letter is the end's token"
    assert tokenizer(["ab", "a"], padding=True)["input_ids"] == [[1, 2], [0, 1]]


def test_a_seed_names_its_rows(task, rows):
    same = transduction(task, ROWS, shortest=SHORTEST, longest=LONGEST)
    assert same.to_dict() == rows.to_dict()
    other = transduction(task, ROWS, shortest=SHORTEST, longest=LONGEST, seed=1)
    assert other["question"][:] != rows["question"][:]


def test_tasks_do_not_share_their_letters():
    questions = {tuple(transduction(name, 20)["question"]) for name in ("copy", "reverse", "sort")}
    assert len(questions) == 3


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match=r"`task` must be one of \['copy', .*'add'\], got 'multiply'"):
        transduction("multiply", 1)


@pytest.mark.parametrize(("shortest", "longest"), [(0, 3), (5, 4)])
def test_lengths_that_make_no_sense_are_refused(shortest, longest):
    with pytest.raises(ValueError, match=f"`shortest` must be at least 1 .* got {shortest} and {longest}"):
        transduction("copy", 1, shortest=shortest, longest=longest)


def test_answers_are_counted_by_tokens_and_by_rows():
    labels = np.array([[-100, -100, 3, 4], [-100, -100, -100, 5], [-100, 6, 7, 8]])
    # a row's last prediction is of no label, and those before its answer do not count
    tokens = np.array([[9, 3, 4, 9], [9, 9, 0, 5], [6, 0, 8, 9]])
    counted = answer_accuracy(EvalPrediction(tokens, labels))
    assert counted == {"accuracy": pytest.approx(4 / 6), "exact_match": pytest.approx(1 / 3)}


def test_a_row_that_counts_as_right_is_what_greedy_generation_writes():
    tokenizer = character_tokenizer()
    sizes = {"embedding_size": 16, "hidden_size": 64, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    model = RNNForCausalLM(RNNConfig(vocab_size=40, **sizes))
    rows = transduction("reverse", 60, shortest=2, longest=5)
    collated = DataCollatorForSeq2Seq(tokenizer)([{k: row[k] for k in ("input_ids", "labels")} for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(25):  # until some of the answers are known by heart
        optimizer.zero_grad()
        model(**collated).loss.backward()
        optimizer.step()
    with torch.no_grad():
        tokens = likeliest_tokens(model.eval()(**collated).logits, collated["labels"])
    counted = answer_accuracy(EvalPrediction(tokens.numpy(), collated["labels"].numpy()))
    written = []
    for question in rows["question"]:
        prompt = tokenizer(question, return_tensors="pt")
        after = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, len(question) :]
        written.append(tokenizer.decode(after).removesuffix("<|end|>"))
    right = sum(text == answer for text, answer in zip(written, rows["answer"], strict=True))
    assert 0 < right < len(rows)
    assert counted["exact_match"] == pytest.approx(right / len(rows))
