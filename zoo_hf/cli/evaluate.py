"""`zoo-hf evaluate`."""

import argparse
from pathlib import Path

from ..clm.mistake import Mistake
from .table import markdown_table


DESCRIPTION = """Prints how well a causal language model predicts a text: its loss in nats a token, perplexity, and
bits for each UTF-8 byte, which can be compared between tokenizers. Every token is predicted once, after the tokens
before it in its window; a run's own log has the loss of blocks of --block_size tokens, another one."""


def add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`zoo-hf evaluate`."""
    parser = commands.add_parser(
        "evaluate", help="print loss, perplexity and bits per byte of a model on a text", description=DESCRIPTION
    )
    add_model(parser)
    parser.add_argument(
        "--text", type=Path, help="UTF-8 file to predict; by default the validation share of CPython's documentation"
    )
    parser.add_argument(
        "--window", type=int, help="tokens that a window predicts; by default the model's context, 1024 at most"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="windows in a forward pass (8)")
    parser.add_argument(
        "--harness", action="store_true", help='compute the same by lm-eval: pip install "zoo_hf[harness]"'
    )
    parser.set_defaults(run=run_evaluate)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model that is loaded."""
    parser.add_argument("model", help="folder or name on the Hub of a causal language model")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")


def run_evaluate(options: argparse.Namespace) -> None:
    """Score and print."""
    from ..clm.harness import score_by_harness  # here, as `evaluate` takes a second to import
    from ..clm.model import load_trained
    from ..clm.scoring import score, window_of
    from ..clm.text import text_of

    text = text_of(options.text)
    if options.batch_size < 1:
        raise Mistake(f"--batch_size must be at least 1, got {options.batch_size}.")
    model, tokenizer = load_trained(options.model, options.trust_remote_code)
    by = score_by_harness if options.harness else score
    window = window_of(model, options.window)
    figures = by(model, tokenizer, text, window=window, batch_size=options.batch_size)
    rows = {
        "model": options.model,
        "text": f"{options.text or 'CPython documentation, validation share'}, {len(text.encode()):,} bytes",
        "window": f"{window:,} tokens",
        "loss (nats a token)": f"{figures['loss']:.5f}",
        "perplexity": f"{figures['perplexity']:.5g}",
        "bits per byte": f"{figures['bits_per_byte']:.5f}",
        "computed by": "lm-eval" if options.harness else "evaluate",
    }
    print(markdown_table(rows))
