"""Which examples a member sees: all ranks read the same batches, and a batch is the same whenever it is made again.

What is random in making a batch (a collator's masks, a dataset's augmentations) is drawn from generators that start
from the batch's name: run seed, epoch and place in the epoch. So a run that is resumed reads what an uninterrupted one
reads, without making the batches in between, and with any number of workers.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from .noise import batch_seed
from .perturbation import Member, seeded


class NamedBatch(list):
    """Numbers of a batch's examples, and the seed that the batch has by its name."""

    seed = 0


class NamedBatches(BatchSampler):
    """The batches of another sampler, named.

    Args:
        epoch: the present one's number, asked for when it begins.
    """

    def __init__(self, batch_sampler: Any, seed: int, epoch: Callable[[], int]):
        self.batch_sampler, self.seed, self.epoch = batch_sampler, seed, epoch

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.epoch()
        for place, indices in enumerate(self.batch_sampler):
            batch = NamedBatch(indices)
            batch.seed = batch_seed(self.seed, epoch, place)
            yield batch

    def __len__(self) -> int:
        return len(self.batch_sampler)

    @property
    def sampler(self) -> Any:  # accelerate looks for it here, and may replace it
        return self.batch_sampler.sampler

    @sampler.setter
    def sampler(self, sampler: Any) -> None:
        self.batch_sampler.sampler = sampler


class Batches(Dataset):
    """A dataset whose items are batches that are collated already, for a loader with `NamedBatches`."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]):
        self.dataset, self.collate = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, batch: NamedBatch) -> Any:
        with drawing_from(batch.seed):
            if any("__getitems__" in vars(kind) for kind in type(self.dataset).__mro__):
                return self.collate(self.dataset.__getitems__(list(batch)))
            return self.collate([self.dataset[index] for index in batch])


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Generators of torch's CPU, numpy and Python start from `seed` inside the block, and are put back after it."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        with seeded(seed, torch.device("cpu")):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def as_it_is(batch: Any) -> Any:
    """What collates batches that are collated already."""
    return batch


@contextmanager
def same_batches(
    accelerator: Accelerator, seed: int, seed_worker: Callable[..., None], epoch: Callable[[], int]
) -> Iterator[None]:
    """Data loaders prepared inside the block give the same batches to all ranks, instead of a share to each.

    Args:
        seed: of the order of examples, unless the accelerator has a `data_seed`, and of what batches draw.
        seed_worker: what seeds a loader's workers, as `seed_worker(worker_id, num_workers, rank)`.
        epoch: the present one's number.
    """
    original, data_seed = accelerator.prepare_data_loader, accelerator.dataloader_config.data_seed

    def prepare(loader: DataLoader, **_: object) -> DataLoader:
        # workers would be seeded by rank, and random collators would then differ
        loader.worker_init_fn = partial(seed_worker, num_workers=loader.num_workers, rank=0)
        if loader.batch_sampler is not None and not isinstance(loader.dataset, IterableDataset):
            named = NamedBatches(loader.batch_sampler, seed, epoch)
            dataset = Batches(loader.dataset, loader.collate_fn)
            vars(loader).update(batch_sampler=named, dataset=dataset)  # a loader does not let them be set
            loader.collate_fn = as_it_is
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


def split(
    inputs: dict[str, Any],
    members: list[Member],
    pairs: int,
    *,
    count: Callable[[dict[str, Any]], float],
    total: float,
) -> list[tuple[dict[str, Any], float]]:
    """Every member's share of a batch, and what its mean loss counts, so that the mean over pairs is the whole loss.

    Pair i of n has rows ⌊iB/n⌋ … ⌊(i+1)B/n⌋ − 1 of a batch's B, and one row at least: with fewer rows than pairs,
    neighbours have the same row. A share counts n · its items / (all items · pairs that have it).

    Args:
        pairs: n.
        count: items whose mean a share's loss is, such as labels.
        total: items of the whole batch, or of all micro-batches of an update.

    Raises:
        ValueError: no tensor says how many rows there are.
    """
    rows = next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim), 0)
    if rows == 0:
        raise ValueError('`data`="split": no tensor of the batch has rows: use `data`="shared".')
    spans = [rows_of(index, pairs, rows) for index in range(pairs)]
    parts: dict[tuple[int, int], tuple[dict[str, Any], float]] = {}
    for first, last in dict.fromkeys(spans[member.direction.index] for member in members):
        part = {name: value[first:last] if has_rows(value, rows) else value for name, value in inputs.items()}
        parts[first, last] = part, pairs * count(part) / total / spans.count((first, last))
    return [parts[spans[member.direction.index]] for member in members]


def has_rows(value: Any, rows: int) -> bool:
    """Whether an entry of a batch is a tensor with one row for each example."""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows


def rows_of(index: int, pairs: int, rows: int) -> tuple[int, int]:
    """First row of a pair, and the one after its last."""
    first = index * rows // pairs
    return first, max(first + 1, (index + 1) * rows // pairs)
