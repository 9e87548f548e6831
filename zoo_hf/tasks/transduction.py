"""Sequences to sequences: the tasks that recurrent models have been measured on since the neural Turing machine.

References:
    Graves, Wayne, Danihelka: Neural Turing Machines. 2014. arXiv:1410.5401.
    Chaubard, Kochenderfer: Scaling Recurrent Neural Networks to a Billion Parameters with Zero-Order Optimization.
    2025. arXiv:2505.17852.
"""

from collections.abc import Callable
from string import ascii_lowercase, digits

import numpy as np
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


END = "<|end|>"
MOST_REPEATS = 4


def copy(letters: str, rng: np.random.Generator) -> tuple[str, str]:
    """`abc abc`."""
    return f"{letters} ", letters


def repeat_copy(letters: str, rng: np.random.Generator) -> tuple[str, str]:
    """`abc2 abcabc`, 1 to 4 times."""
    times = int(rng.integers(1, MOST_REPEATS + 1))
    return f"{letters}{times} ", letters * times


def reverse(letters: str, rng: np.random.Generator) -> tuple[str, str]:
    """`abc cba`."""
    return f"{letters} ", letters[::-1]


def sort(letters: str, rng: np.random.Generator) -> tuple[str, str]:
    """`bca abc`."""
    return f"{letters} ", "".join(sorted(letters))


def add(letters: str, rng: np.random.Generator) -> tuple[str, str]:
    """`1+2+9=12`, as many digits as there would be letters."""
    numbers = rng.integers(0, 10, len(letters))
    return "+".join(map(str, numbers)) + "=", str(numbers.sum())


TASKS: dict[str, Callable[[str, np.random.Generator], tuple[str, str]]] = {
    "copy": copy,
    "repeat_copy": repeat_copy,
    "reverse": reverse,
    "sort": sort,
    "add": add,
}


def transduction(task: str, rows: int, *, shortest: int = 2, longest: int = 10, seed: int = 0) -> Dataset:
    """Questions and their answers, of lengths that are uniform between `shortest` and `longest`.

    The letters a to z, or digits, are uniform too. Longer ones than a model was trained on, from `longest` + 1 on,
    show whether it has learned the task or the lengths.

    Columns: `question` and `answer`, `input_ids` of both and of an end, and `labels`, −100 for the question's.

    Args:
        task: one of `TASKS`.
        rows: examples; the same seed gives the same ones, and may give one twice.
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {[*TASKS]}, got {task!r}.")
    if not 1 <= shortest <= longest:
        raise ValueError(f"`shortest` must be at least 1 and at most `longest`, got {shortest} and {longest}.")
    rng, tokenizer = np.random.default_rng((seed, [*TASKS].index(task))), character_tokenizer()
    examples = []
    for length in rng.integers(shortest, longest + 1, rows):
        question, answer = TASKS[task]("".join(rng.choice([*ascii_lowercase], length)), rng)
        before, after = (tokenizer(text)["input_ids"] for text in (question, answer))
        after.append(tokenizer.eos_token_id)
        labels = [-100] * len(before) + after
        examples.append({"question": question, "answer": answer, "input_ids": before + after, "labels": labels})
    return Dataset.from_list(examples)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 40 tokens: letters, digits, space, plus, equals, and one for the end, padding and the unknown."""
    vocabulary = {name: number for number, name in enumerate([END, *ascii_lowercase, *digits, *" +="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
    )
