"""What a failed population says of itself: did memory not suffice, what was wrong, and where."""

import re
import traceback
from pathlib import Path

import torch


def out_of_memory(error: Exception) -> bool:
    """Whether an allocator gave up; not all have a class of errors of their own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in FULL)


FULL = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)
# of torch, to file an issue about what is no fault of its own
ADVICE = re.compile(r",?\s*(Please file|If error is occurring|\(Triggered internally).*", re.DOTALL | re.IGNORECASE)


def said(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(ADVICE.sub("", str(error)).split()) or type(error).__name__


def place(error: Exception) -> str:
    """Where in the objective it was raised: file, line and function of the innermost frame outside of torch."""
    here, torchs = Path(__file__).parent, str(Path(torch.__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    calls = [n for n, f in enumerate(frames) if f.name == "forward" and Path(f.filename) == here / "population.py"]
    inside = frames[calls[0] :] if calls else []  # from where the objective is called
    found = [f for f in inside if Path(f.filename).parent != here and not f.filename.startswith(torchs)]
    return f"; {found[-1].filename}, line {found[-1].lineno}, in {found[-1].name}" if found else ""
