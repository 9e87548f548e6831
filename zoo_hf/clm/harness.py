"""The figures of `scoring`, computed by lm-eval (EleutherAI's lm-evaluation-harness) through its model class HFLM."""

import math
from typing import Any

from datasets import Dataset

from ..tasks import perplexity
from .mistake import Mistake
from .scoring import first_token


NAME = "text"


def score_by_harness(model: Any, tokenizer: Any, text: str, *, window: int, batch_size: int) -> dict[str, float]:
    """As `scoring.score`, of the same windows. Nothing is downloaded: the task is made of the text.

    Raises:
        Mistake: lm-eval is not installed.
    """
    try:  # here, as it takes seconds to import
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise Mistake(f'--harness needs lm-eval: pip install "zoo_hf[harness]" ({error}).') from error
    evaluated: Any = HFLM(
        pretrained=model,
        backend="causal",
        tokenizer=tokenizer,
        max_length=window,
        batch_size=batch_size,
        prefix_token_id=first_token(tokenizer),
        add_bos_token=False,
        softmax_dtype="float32",
    )
    task: Any = ConfigurableTask(config=task_of(text, len(evaluated.tok_encode(text))))
    manager = TaskManager(include_defaults=False)  # its own tasks take seconds to list
    results = simple_evaluate(evaluated, tasks=[task], task_manager=manager, bootstrap_iters=0)["results"][NAME]
    return {name: results[f"{name},none"] for name in ("loss", "perplexity", "bits_per_byte")}


def task_of(text: str, tokens: int) -> dict[str, Any]:
    """A task of lm-eval's with one document, whose every token is to be predicted."""

    def figures(doc: dict[str, str], results: list[float]) -> dict[str, float]:
        loss = -results[0] / tokens
        bits = -results[0] / math.log(2) / len(doc["text"].encode())
        return {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": bits}

    def only(values: list[float]) -> float:
        (value,) = values
        return value

    metrics = [
        {"metric": name, "aggregation": only, "higher_is_better": False}
        for name in ("loss", "perplexity", "bits_per_byte")
    ]
    return {
        "task": NAME,
        "custom_dataset": lambda **_: {"validation": Dataset.from_dict({"text": [text]})},
        "validation_split": "validation",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": lambda doc: "",
        "doc_to_target": lambda doc: doc["text"],
        "process_results": figures,
        "metric_list": metrics,
    }
