"""Training runs in processes of their own, forked from one that has imported everything, and killed for real."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import texts, tiny_lstm

from zoo_hf import ZOOConfig, ZOOTrainer


PYTHON = sys.executable
STEPS, SAVED = 9, 4  # updates of a run, and after how many it saves


def hide(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Batches with a random half of the tokens hidden, by torch's generator."""
    tokens = torch.stack([example["input_ids"] for example in examples])
    return {"input_ids": tokens.where(torch.rand(tokens.shape) < 0.5, 0), "labels": tokens}


def run(folder: Path, **arguments: Any) -> ZOOTrainer:
    """Train, or go on where there is something to go on from; three updates an epoch, the last of them ragged."""
    defaults = {
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVED,
        "logging_steps": 1,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "num_directions": 4,
        "probes": "serial",
    }
    args = ZOOConfig(str(folder), **defaults | arguments)
    trainer = ZOOTrainer(tiny_lstm(), args, train_dataset=texts(10), data_collator=hide)
    trainer.train(resume_from_checkpoint=any(folder.glob("trajectory.zoo")) or None)
    return trainer


def forked(work: Callable[[], Any]) -> int:
    """The number of a new process that does some work and ends, with 0 if it went well; what it prints is dropped."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work()
        code = 0
    finally:
        os._exit(code)


def ended(process: int) -> int:
    """How a process ended: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Torn:
    """A file of which one write ends, with the process, after some bytes."""

    def __init__(self, file: Any, share: float):
        self.file, self.share = file, share

    def __enter__(self) -> "Torn":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, content: bytes) -> int:
        self.file.write(content[: int(self.share * len(content))])
        kill_self()
        raise AssertionError("killed")


def in_a_probe(folder: Path, draw: random.Random) -> None:
    """Killed in a forward pass, at displaced weights."""
    left = draw.randrange(8 * STEPS)

    def count(module: torch.nn.Module, _: Any) -> None:
        nonlocal left
        if isinstance(module, torch.nn.Embedding):
            left -= 1
            if left < 0:
                kill_self()

    torch.nn.modules.module.register_module_forward_pre_hook(count)
    run(folder)


def in_an_update(folder: Path, draw: random.Random) -> None:
    """Killed when the optimizer has changed the weights."""
    left, original = draw.randrange(STEPS), torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal left
        original(self, *args, **kwargs)
        left -= 1
        if left < 0:
            kill_self()

    torch.optim.AdamW.step = step
    run(folder)


def in_an_append(folder: Path, draw: random.Random) -> None:
    """Killed when a part of a step's record is written."""
    left, share, original = draw.randrange(STEPS), draw.random(), Path.open

    def opened(self: Path, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        nonlocal left
        file = original(self, mode, buffering, **kwargs)
        if mode != "r+b" or buffering != 0:
            return file
        left -= 1
        return file if left >= 0 else Torn(file, share)

    Path.open = opened
    run(folder)


def killed_at_any_time(folder: Path, draw: random.Random, seconds: float) -> int:
    """Killed from outside, at a moment that is drawn from the whole run; how it ended."""
    process = forked(lambda: run(folder))
    time.sleep(draw.random() * seconds)
    os.kill(process, signal.SIGKILL)
    return ended(process)


def killed_in_a_save(folder: Path, draw: random.Random) -> int:
    """Killed from outside, soon after the folder of a checkpoint has appeared; how it ended."""
    wanted, delay = folder / f"checkpoint-{draw.choice([SAVED, 2 * SAVED])}", draw.random() * 0.03
    if wanted.exists():
        return 0
    process = forked(lambda: run(folder))
    while not wanted.exists() and os.waitpid(process, os.WNOHANG) == (0, 0):
        time.sleep(1e-4)
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    return ended(process)


def print_when_there(folder: str) -> None:
    """Say STEPS when a run has made a few of them."""
    path = Path(folder, "trajectory.zoo")
    while not path.exists() or path.stat().st_size < 10_000:
        time.sleep(0.01)
    print("STEPS", flush=True)
