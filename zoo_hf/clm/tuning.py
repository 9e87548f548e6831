"""Which learning rate a run should have."""

from pathlib import Path

from ..config import ZOOConfig
from ..learning_rate import Found
from .arguments import DataTrainingArguments, ModelArguments
from .run import make_trainer


STEPS = 10  # with each rate


def tune(model_args: ModelArguments, data_args: DataTrainingArguments, args: ZOOConfig) -> None:
    """Try learning rates with the run's first steps, and say which one to set. Nothing is trained or kept."""
    args.do_train = True  # the steps are those of training
    trainer = make_trainer(model_args, data_args, args)
    found = trainer.find_learning_rate(steps=STEPS)
    if trainer.is_world_process_zero():
        print(f"{table(found)}\n\n{advice(found, args)}")
        print(f"The losses are drawn in {Path(str(args.output_dir)).resolve() / 'learning_rate.png'}")


def table(found: Found) -> str:
    """Learning rates and losses, as a Markdown table."""
    rows = [("learning rate", f"loss after {STEPS} steps"), ("---", "---"), ("before", f"{found.start:.4f}")]
    for rate, loss in zip(found.rates, found.losses, strict=True):
        rows.append((f"{rate:g}", f"{loss:.4f}" + (" (best)" if rate == found.best and loss < found.start else "")))
    width = max(len(first) for first, _ in rows)
    return "\n".join(f"| {first:<{width}} | {second} |" for first, second in rows)


def advice(found: Found, args: ZOOConfig) -> str:
    """What to set."""
    if not min(found.losses) < found.start:
        return "None of them lowered the loss: raise --num_directions, or change --smoothing_radius."
    said = f"Set --learning_rate {found.best:g} in place of {args.learning_rate:g}; a long run may want half of it."
    return said + (" It is the largest that was tried: try larger ones." if found.best == found.rates[-1] else "")
