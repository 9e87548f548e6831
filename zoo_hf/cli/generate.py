"""`zoo-hf generate`."""

import argparse
from typing import Any

from ..clm.mistake import Mistake
from .evaluate import add_model


def add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`zoo-hf generate`."""
    parser = commands.add_parser(
        "generate",
        help="print what a model writes after a prompt",
        description="Prints the prompt and what a causal language model writes after it, unprintable characters as "
        "dots. The same seed gives the same text.",
    )
    add_model(parser)
    parser.add_argument("--prompt", required=True, help="how the text begins")
    parser.add_argument("--tokens", type=int, default=200, help="to write at most (200)")
    parser.add_argument(
        "--temperature", type=float, help="0: the likeliest token each time; by default the model's own, mostly 1"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of tokens (0)")
    parser.set_defaults(run=run_generate)


def run_generate(options: argparse.Namespace) -> None:
    """Sample and print."""
    from ..clm.model import load_trained  # here, as `evaluate` takes a second to import
    from ..clm.sampling import written

    if options.tokens < 1:
        raise Mistake(f"--tokens must be at least 1, got {options.tokens}.")
    how = choice(options.temperature)
    model, tokenizer = load_trained(options.model, options.trust_remote_code)
    print(written(model, tokenizer, options.prompt, options.tokens, seed=options.seed, **how))


def choice(temperature: float | None) -> dict[str, Any]:
    """How the next token is chosen, as arguments of `generate`."""
    if temperature is None:
        return {}
    if not 0 <= temperature < float("inf"):
        raise Mistake(f"--temperature must be a number from 0 on, got {temperature}.")
    return {"temperature": temperature} if temperature else {"do_sample": False}
