"""Who evaluates which members; scalars in, scalars out; are the ranks still equal?

Every rank sees the same batch, evaluates its share of the members, and makes the same update from all losses. In
training these cross ranks, and nothing else: at the start, the weights, the buffers, a generator's state and hashes of
what has to be equal; for every update, the losses of its members; every `rank_check_steps` updates, a hash; for every
entry of the Trainer's log and every checkpoint, single numbers: the loss and the count of floating-point operations.
Evaluation is the Trainer's own: ranks share out the examples.
"""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from hashlib import sha256
from secrets import randbits
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import broadcast, synchronize_rng_states
from torch import Tensor

from .interrupt import Interrupted


PATIENCE = 15.0  # seconds that a rank may be later than the longest step so far
ASKING = 5.0  # seconds in which ranks tell each other, after a failure, that they are there
POLL = 1.0  # seconds between looks at whether another rank has noticed a failure
STOP = 0x7FF8_0000_5354_4F50  # bits of the NaN that stands for a loss when a rank was asked to stop


c10d: Any = torch.distributed  # whose types lack what is used here


class RankError(RuntimeError):
    """A rank has failed, or ranks are not equal; the message names it."""


def share(total: int, rank: int, world_size: int) -> slice:
    """The members, out of `total`, that a rank evaluates: neighbours, and on no two ranks more than one apart."""
    return slice(rank * total // world_size, (rank + 1) * total // world_size)


class Ranks:
    """What the ranks of a run tell each other.

    Args:
        accelerator: knows how many ranks there are, and which one this is.
        timeout: seconds that ranks wait for each other at the start, and after a save or an evaluation.
    """

    def __init__(self, accelerator: Accelerator, timeout: float):
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.timeout = timeout
        self.bytes = 0  # given to the others since `take_bytes`
        self.longest = 0.0  # step so far, in seconds
        self.last: float | None = None  # when ranks last met; None: there may be much to wait for
        self.equal = 0  # steps after which the ranks' weights were last seen to be equal
        self.device = accelerator.device
        self.name = ""  # of the group in which they meet
        self.group: Any = None
        if self.several:
            self._open()

    def _open(self) -> None:
        """A group of our own: the losses are on the CPU, and what is late should not wait for a GPU's collectives.

        Its name is its own, too, as processes that torchrun has restarted find the keys of those before.
        """
        self.name = f"zoo_hf/{int(broadcast(torch.tensor([randbits(62)], device=self.device)))}"
        store = c10d.PrefixStore(self.name, connected())
        self.group = c10d.ProcessGroupGloo(store, self.rank, self.world_size, timedelta(seconds=self.timeout))

    def close(self) -> None:
        """End the group's threads while nothing is under way: at the end of the process they may not find Python."""
        self.group, self.last = None, None

    @property
    def several(self) -> bool:
        return self.world_size > 1

    def exchange(self, losses: Tensor, total: int) -> Tensor:
        """Every rank's losses, (total,) float64 on the CPU, from this rank's share of them.

        All ranks receive the same bits: a loss crosses as the integer that its bits make, and each place is one such
        integer plus zeros.

        Raises:
            Interrupted: on all ranks, when one was asked to stop.
            RankError: a rank has not come.
        """
        everyone = torch.zeros(total, dtype=torch.float64)
        everyone[share(total, self.rank, self.world_size)] = losses
        if self.several:
            bits = everyone.view(torch.int64)
            self._sum_(bits)
        if (everyone.view(torch.int64) == STOP).any():
            raise Interrupted
        return everyone

    def check(self, values: dict[str, bytes], step: int) -> None:
        """Compare values by their hashes.

        Raises:
            RankError: some are not equal; it says which, on which ranks and since which step.
        """
        hashes = b"".join(sha256(value).digest() for value in values.values())
        parts = torch.zeros(self.world_size, len(values), 4, dtype=torch.int64)
        parts[self.rank] = torch.frombuffer(bytearray(hashes), dtype=torch.int64).view(len(values), 4)
        self._sum_(parts)
        for place, name in enumerate(values):
            others = [rank for rank, part in enumerate(parts) if not torch.equal(part[place], parts[0][place])]
            if others:
                since = f"they were equal after step {self.equal}" if self.equal else "at the start of the run"
                raise RankError(f"Ranks differ in {name} at step {step}: {others} from rank 0; {since}.")
        self.equal = step

    def meet(self) -> None:
        """Wait until all ranks are here.

        Raises:
            RankError: one has not come.
        """
        self._sum_(torch.zeros(1, dtype=torch.int64))

    def take_bytes(self) -> int:
        """Bytes given to the others since this was last asked."""
        taken, self.bytes = self.bytes, 0
        return taken

    def unhurried(self) -> None:
        """Ranks may next meet late: one of them saves, or they evaluate."""
        self.last = None

    def _sum_(self, numbers: Tensor) -> None:
        """Sum of all ranks' numbers, in place; they are waited for not much longer than the longest step so far.

        Raises:
            RankError: one has not come.
        """
        if self.group is None:  # another run of the same trainer
            self._open()
        self.bytes += numbers.nbytes
        patience = self.timeout if self.last is None else self.longest + PATIENCE
        begun, roll_call = time.monotonic(), RollCall(self.name, self.rank, self.world_size)
        options = c10d.AllreduceOptions()
        options.timeout = timedelta(seconds=patience)
        try:
            work = self.group.allreduce([numbers], options)
            while not arrived(work):
                if roll_call.called():
                    raise RuntimeError(f"waited for {time.monotonic() - begun:.0f} s")
        except (RuntimeError, OSError) as error:
            raise roll_call.error(patience) from error
        now = time.monotonic()
        if self.last is not None:
            self.longest = max(self.longest, now - self.last)
        self.last = now


def arrived(work: Any) -> bool:
    """Whether a collective is done, after waiting a little for it.

    Raises:
        RuntimeError: it has failed.
    """
    try:
        return work.wait(timedelta(seconds=POLL))
    except RuntimeError:
        if work.is_completed():
            raise
        return False


class RollCall:
    """After a failure: who is still there?"""

    def __init__(self, prefix: str, rank: int, world_size: int):
        self.prefix, self.rank, self.world_size = prefix, rank, world_size

    def called(self) -> bool:
        """Whether another rank has noticed a failure."""
        return connected().check([f"{self.prefix}/failed"])

    def error(self, patience: float) -> RankError:
        """Tell the others of it, and name those that do not answer."""
        try:
            store = connected()
            store.set(f"{self.prefix}/failed", "")
            store.set(f"{self.prefix}/{self.rank}", "")
            time.sleep(ASKING)
            lost = [rank for rank in range(self.world_size) if not store.check([f"{self.prefix}/{rank}"])]
        except (RuntimeError, OSError) as error:  # it was kept by rank 0, or by a launcher that is gone
            return RankError(f"A rank has died, and so has the process that knew which one ({error}). {REMEDY}")
        return RankError(
            f"Rank {', '.join(map(str, lost)) or '?'} of {self.world_size} has died, hangs or ran out of memory: it "
            f"did not come within {patience:.0f} s; its own output may say why. {REMEDY}"
        )


def connected() -> Any:
    """The store through which the ranks' processes have found each other."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return c10d.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=ASKING), wait_for_workers=False)


REMEDY = "No finished step is lost: start again with `resume_from_checkpoint=True`."


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Give every rank the tensors of rank 0, in place, and torch's CPU generator, which collators draw from."""
    synchronize_rng_states(["torch"])
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(broadcast(tensor.detach().clone()))


def broadcast_bytes(content: bytes, device: torch.device) -> bytes:
    """The bytes that rank 0 has, on every rank."""
    size = broadcast(torch.tensor([len(content)], device=device))
    mine = torch.frombuffer(bytearray(content.ljust(int(size), b"\0")[: int(size)] or b"\0"), dtype=torch.uint8)
    return broadcast(mine.to(device)).cpu().numpy().tobytes()[: int(size)]


@contextmanager
def alone(accelerator: Accelerator) -> Iterator[None]:
    """What an objective gathers inside the block is its own: ranks evaluate other members, perhaps more or fewer."""
    originals = accelerator.gather, accelerator.gather_for_metrics
    accelerator.gather = accelerator.gather_for_metrics = lambda value, *_, **__: value
    try:
        yield
    finally:
        accelerator.gather, accelerator.gather_for_metrics = originals
