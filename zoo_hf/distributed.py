"""Who evaluates which members; scalars in, scalars out.

Every rank sees the same batch, evaluates its share of the members, and makes the same update from all losses. In
training these cross ranks, and nothing else: once, at the start, the weights, the buffers and a generator's state; for
every update, the losses of its members; for every entry of the Trainer's log and every checkpoint, single numbers: the
loss and the count of floating-point operations. Evaluation is the Trainer's own: ranks share out the examples.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast, synchronize_rng_states
from torch import Tensor
from torch.utils.data import DataLoader


def share(total: int, rank: int, world_size: int) -> slice:
    """The members, out of `total`, that a rank evaluates: neighbours, and on no two ranks more than one apart."""
    return slice(rank * total // world_size, (rank + 1) * total // world_size)


def exchange(losses: Tensor, total: int, accelerator: Accelerator) -> Tensor:
    """Every rank's losses, (total,) float64 on the CPU, from this rank's share of them.

    All ranks receive the same bits: a loss crosses as the integer that its bits make, and each place is one such
    integer plus zeros. Some devices have no float64, and all have int64.
    """
    everyone = torch.zeros(total, dtype=torch.float64)
    everyone[share(total, accelerator.process_index, accelerator.num_processes)] = losses
    if accelerator.num_processes == 1:
        return everyone
    bits = everyone.view(torch.int64).to(accelerator.device)
    return accelerator.reduce(bits, reduction="sum").cpu().view(torch.float64)


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Give every rank the tensors of rank 0, in place, and torch's CPU generator, which collators draw from."""
    synchronize_rng_states(["torch"])
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(broadcast(tensor.detach().clone()))


@contextmanager
def alone(accelerator: Accelerator) -> Iterator[None]:
    """What an objective gathers inside the block is its own: ranks evaluate other members, perhaps more or fewer."""
    originals = accelerator.gather, accelerator.gather_for_metrics
    accelerator.gather = accelerator.gather_for_metrics = lambda value, *_, **__: value
    try:
        yield
    finally:
        accelerator.gather, accelerator.gather_for_metrics = originals


@contextmanager
def same_batches(accelerator: Accelerator, seed: int, seed_worker: Callable[..., None]) -> Iterator[None]:
    """Data loaders prepared inside the block give the same batches to all ranks, instead of a share to each.

    Args:
        seed: of the order of examples, unless the accelerator has a `data_seed`.
        seed_worker: what seeds a loader's workers, as `seed_worker(worker_id, num_workers, rank)`.
    """
    original, data_seed = accelerator.prepare_data_loader, accelerator.dataloader_config.data_seed

    def prepare(loader: DataLoader, **_: object) -> DataLoader:
        # workers would be seeded by rank, and random collators would then differ
        loader.worker_init_fn = partial(seed_worker, num_workers=loader.num_workers, rank=0)
        return prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            rng_types=accelerator.rng_types.copy(),
            dispatch_batches=False,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=seed if data_seed is None else data_seed,  # never a rank's own generator
            non_blocking=accelerator.non_blocking,
        )

    accelerator.prepare_data_loader = prepare
    try:
        yield
    finally:
        accelerator.prepare_data_loader = original
