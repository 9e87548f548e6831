"""A run of ranks of which one fails, as its first argument says: torchrun … failing.py HOW FOLDER --use_cpu."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import TrainerCallback


sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.ranks import corpus, lstm

from zoo_hf import ZOOConfig, ZOOTrainer


STEPS, FAILS = 8, 5  # updates of a run, and the one in which the last rank fails


class Failing(TrainerCallback):
    """Lets the last rank fail at the beginning of a step."""

    def __init__(self, how: str):
        self.how = how

    def on_step_end(self, args, state, control, **kwargs):
        if self.how == "hangs after a step" and state.global_step == FAILS and torch.distributed.get_rank() == 2:
            print(f"FAILS {time.time()}", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)

    def on_step_begin(self, args, state, control, model, **kwargs):
        ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if state.global_step != FAILS or rank != ranks - 1 or not first_start:
            return
        if self.how != "hangs after a step":
            print(f"FAILS {time.time()}", flush=True)
        if self.how in ("dies", "restarted"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "hangs":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.how == "out of memory":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if self.how == "drifts":
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] += 1e-6
        if self.how == "terminated":
            os.kill(os.getpid(), signal.SIGTERM)


def main(how: str, folder: str) -> None:
    rank = torch.distributed.get_rank()
    args = ZOOConfig(
        folder,
        num_directions=8 + (how == "configured otherwise" and rank),
        probes="serial",
        per_device_train_batch_size=4,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=4,
        logging_steps=1,
        rank_check_steps=2,
        disable_tqdm=True,
        use_cpu=True,
    )
    torch.manual_seed(0)
    data = corpus().select(range(10 - (how == "other data" and rank)))
    trainer = ZOOTrainer(lstm(), args, train_dataset=data, callbacks=[Failing(how)])
    resume = True if how == "resumed" else None
    trainer.train(resume_from_checkpoint=resume)
    if rank == 0:
        torch.save(trainer.model.state_dict(), Path(folder, "final.pt"))


if __name__ == "__main__":
    PartialState(cpu="--use_cpu" in sys.argv)
    main(sys.argv[1], sys.argv[2])
    PartialState().destroy_process_group()  # whose threads may otherwise abort a process that ends, as torch warns
