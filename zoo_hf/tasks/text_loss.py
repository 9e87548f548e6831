"""How well a language model predicts texts, in figures that are compared, through `evaluate`."""

import math

import evaluate
from datasets import Features, List, Value


class TextLoss(evaluate.Metric):
    """Loss, perplexity and bits per byte of texts, from the nats that a model needed for each of their tokens.

    With ℓ the sum of −ln p over all tokens of all texts: loss = ℓ / tokens, perplexity = e^loss, and bits per byte =
    ℓ / (ln 2 · UTF-8 bytes), which can be compared between tokenizers. Computed without a network.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Loss in nats a token, perplexity, and bits for each UTF-8 byte.",
            citation="",
            inputs_description="predictions: −ln p of each token of a text; references: the texts.",
            features=Features(predictions=List(Value("float64")), references=Value("string")),
        )

    def _compute(self, predictions: list[list[float]], references: list[str]) -> dict[str, float]:
        nats = math.fsum(nat for row in predictions for nat in row)
        loss = nats / sum(map(len, predictions))
        size = sum(len(text.encode()) for text in references)
        return {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": nats / math.log(2) / size}


def perplexity(loss: float) -> float:
    """e^loss, or infinity where that is no float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
