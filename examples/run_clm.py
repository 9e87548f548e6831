r"""Trains a causal language model on text without backpropagation.

    python examples/run_clm.py

trains a small LSTM on CPython's own documentation, byte by byte, to a validation loss of 2.08 nats a byte after 96,000
forward passes, two minutes on one core, and writes the model, its tokenizer, a plot of the loss and a model card to
`outputs/lstm-python-docs`. On text and a model of your choice:

    python examples/run_clm.py --train_file notes.txt --do_train --do_eval --output_dir outputs/notes \
        --config_overrides cell_type=gru,hidden_size=128

Several processes share the work: `accelerate launch examples/run_clm.py` on GPUs, and on one CPU
`accelerate launch --multi_gpu --num_processes 2 examples/run_clm.py --use_cpu`. All arguments may stand in a JSON file
instead: `python examples/run_clm.py job.json`. `--help` lists them.
"""

import sys
from pathlib import Path

from zoo_hf import PushError
from zoo_hf.callbacks import DrawingError
from zoo_hf.clm.command_line import parse_arguments
from zoo_hf.clm.mistake import Mistake
from zoo_hf.clm.run import run


def main() -> None:
    """`run` makes the `ZOOTrainer` of these arguments and trains it; `zoo-hf train` calls it as well."""
    try:
        run(*parse_arguments(sys.argv[1:], __doc__))
    except (Mistake, PushError, DrawingError) as mistake:
        print(f"{Path(sys.argv[0]).name}: error: {mistake}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
