"""How often a language model's likeliest next token is the next token, through `evaluate`."""

from typing import Any

import evaluate
import numpy as np
from datasets import Features, List, Value
from torch import Tensor
from transformers import EvalPrediction


IGNORED = -100  # label of a token that is not to be predicted


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference, like the Hub's `accuracy`, for rows of tokens and offline."""

    def _info(self) -> evaluate.MetricInfo:
        rows = List(Value("int32"))
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            inputs_description="Rows of integers.",
            features=Features(predictions=rows, references=rows),
        )

    def _compute(self, predictions: list[list[int]], references: list[list[int]]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.concatenate(predictions) == np.concatenate(references)))}


def likeliest_tokens(logits: Any, labels: Tensor) -> Tensor:
    """The likeliest token at each position: `preprocess_logits_for_metrics`, so that no logits are kept."""
    scores = logits[0] if isinstance(logits, tuple) else logits  # others, such as a state, may follow
    return scores.argmax(dim=-1)


def next_token_accuracy(evaluated: EvalPrediction) -> dict[str, float]:
    """`accuracy` of the likeliest tokens: `compute_metrics`, which the Trainer logs as `eval_accuracy`."""
    metric = Accuracy(keep_in_memory=True)  # processes that share a file would wait for each other
    tokens: Any = evaluated.predictions  # an array (B, T), and so are the labels
    labels: Any = evaluated.label_ids
    counted = labels[:, 1:] != IGNORED
    # as one row, since an array is stored faster than many
    return metric.compute(predictions=[tokens[:, :-1][counted]], references=[labels[:, 1:][counted]])


def answer_accuracy(evaluated: EvalPrediction) -> dict[str, float]:
    """`next_token_accuracy`, and `exact_match`: the share of rows all of whose labels are the likeliest tokens.

    Such a row's answer is what greedy generation gives, as every token follows the right ones.
    """
    tokens: Any = evaluated.predictions  # (B, T), and so are the labels
    labels: Any = evaluated.label_ids
    right = (tokens[:, :-1] == labels[:, 1:]) | (labels[:, 1:] == IGNORED)
    return next_token_accuracy(evaluated) | {"exact_match": float(right.all(axis=1).mean())}
