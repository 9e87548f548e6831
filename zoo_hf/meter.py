"""What a forward pass does: how many operations, over how many bytes, and how much it holds at once."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Work(NamedTuple):
    """What was done.

    Args:
        operations: of torch, each with an overhead of its own.
        bytes: that they read and wrote.
        flops: of their matrix products, two for each multiplication.
        peak: bytes of the tensors that were made and held at once.
    """

    operations: int
    bytes: int
    flops: int
    peak: int


def work(run: Callable[[], Any]) -> Work:
    """What a call does, from one run of it: a function of shapes alone, with no clock and no memory read."""
    with Meter() as meter:
        run()
    return Work(meter.operations, meter.bytes, meter.flops, meter.peak)


class Meter(TorchDispatchMode):
    """Counts while it is active; under `torch.func.vmap` what is done for all members."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = self.flops = self.peak = self.held = 0
        self.known: set[int] = set()  # storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = list(tensors((args, kwargs))), list(tensors(result))
        storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        new = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in storages]
        in_place = func._schema.is_mutable
        if new or in_place:  # else it looks at its inputs in another way
            self.operations += 1
            self.bytes += sum(tensor.nbytes for tensor in inputs + new)
            self.flops += PRODUCTS.get(func.overloadpacket, nothing)(inputs, outputs)
        for tensor in new:
            self._hold(tensor)
        return result

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.held -= size


def tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def nothing(inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> int:
    return 0


def of_a_product(inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """2 · outputs · (length of what is summed), which is the last dimension of the last but one matrix."""
    return 2 * outputs[0].numel() * inputs[-2].shape[-1]


def of_a_linear_layer(inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """2 · outputs · (length of what is summed), which is the last dimension of the first factor."""
    return 2 * outputs[0].numel() * inputs[0].shape[-1]


def of_a_recurrent_layer(inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Of torch's fused ones: every token, (B, T) or (T, B) of them, meets every weight of a matrix."""
    weights = sum(tensor.numel() for tensor in inputs[1:] if tensor.dim() == 2)
    return 2 * inputs[0].shape[:2].numel() * weights


def of_a_scan(inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Of ours: every pre-activation (…, G·D) is a row of R times h, (…, D)."""
    return 2 * inputs[0].numel() * outputs[0].shape[-1]


def of_a_head(inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Of ours: hidden states (…, D) meet every row of (…, V, D)."""
    return 2 * inputs[0].numel() * inputs[1].shape[-2]


PRODUCTS: dict[Any, Callable[[list[Tensor], list[Tensor]], int]] = {
    # the first of these are left whole in inference mode alone
    torch.ops.aten.linear: of_a_linear_layer,
    torch.ops.aten.matmul: of_a_linear_layer,
    torch.ops.aten.lstm: of_a_recurrent_layer,
    torch.ops.aten.gru: of_a_recurrent_layer,
    torch.ops.aten.rnn_tanh: of_a_recurrent_layer,
    torch.ops.zoo_hf.perturbed_linear_population: of_a_linear_layer,
    torch.ops.zoo_hf.low_rank_linear_population: of_a_linear_layer,
    torch.ops.zoo_hf.recurrent_scan_population: of_a_scan,
    torch.ops.zoo_hf.head_loss_population: of_a_head,
    torch.ops.aten.mm: of_a_product,
    torch.ops.aten.bmm: of_a_product,
    torch.ops.aten.addmm: of_a_product,
    torch.ops.aten.baddbmm: of_a_product,
    torch.ops.aten.baddbmm_: of_a_product,
}
