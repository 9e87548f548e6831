"""`zoo-hf card`."""

import argparse
from pathlib import Path

from ..cards import RUN_NAME, card_of, run_in
from ..clm.mistake import Mistake


OPTIONS = {
    "dataset": "name of the text or data it was trained and evaluated on",
    "dataset_tags": "that data's name on the Hub",
    "language": "code of the text's language, such as en",
    "license": "identifier of the model's licence, such as apache-2.0",
    "tags": "further tags",
    "model_name": "the card's title; by default the name of the repository or folder",
}
SINGLE = ("license", "model_name")


def add_card(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`zoo-hf card`."""
    parser = commands.add_parser(
        "card",
        help="write the model card of a finished run anew",
        description=f"Writes README.md in the folder of a finished run anew, from its {RUN_NAME}, trajectory "
        "and plot. Of what is not given here nothing is claimed, also where the card said it before.",
    )
    parser.add_argument("run_folder", metavar="run", help="output directory of a run that has ended")
    for name, meaning in OPTIONS.items():
        parser.add_argument(f"--{name}", help=meaning, nargs=None if name in SINGLE else "+")
    parser.set_defaults(run=run_card)


def run_card(options: argparse.Namespace) -> None:
    """Write."""
    try:
        run = run_in(options.run_folder)
    except ValueError as error:
        raise Mistake(str(error)) from error
    card = card_of(run, options.run_folder, **{name: getattr(options, name) for name in OPTIONS})
    path = Path(options.run_folder, "README.md")
    card.save(path)
    print(f"The card is written: {path}")
