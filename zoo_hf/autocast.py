"""Layers that `torch.func.vmap` takes apart before autocast sees them get the dtypes that autocast would give them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from .displaced import Displaced, autocast_dtype


class LikeAutocast(TorchFunctionMode):
    """Layers that vmap takes apart before autocast sees them get the dtypes that autocast would give them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return REPLACED.get(func, func)(*args, **(kwargs or {}))


def norm(of: Callable[..., Tensor], input: Tensor, *sizes: Any, **weights: Any) -> Tensor:
    """torch's layer or group norm, whose weights may be wider than the input; then all is computed in their dtype."""
    wide = [value.dtype for value in (*sizes, *weights.values()) if isinstance(value, Tensor)]
    if not wide or wide[0] == input.dtype:
        return of(input, *sizes, **weights)
    found = of(input.to(wide[0]), *sizes, **weights)
    return found.to(input.dtype) if input.device.type == "cpu" else found  # autocast leaves it wide on a GPU


def narrow(of: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """A product in autocast's dtype."""
    args, kwargs = cast((args, kwargs), None)
    return of(*args, **kwargs)


def wide(of: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """A loss in float32 under autocast."""
    args, kwargs = cast((args, kwargs), torch.float32)
    return of(*args, **kwargs)


def cast(tree: Any, dtype: torch.dtype | None) -> Any:
    """Under autocast the tensors in another dtype, None for autocast's own; a displaced matrix casts its products."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, Displaced) or not value.is_floating_point():
            return value
        own = autocast_dtype(value)
        return value if own is None else value.to(dtype or own)

    return tree_map(one, tree)


PRODUCTS = (
    F.linear,
    F.scaled_dot_product_attention,
    torch.addmm,
    torch.baddbmm,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
)
LOSSES = (F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div)
REPLACED: dict[Any, Callable[..., Tensor]] = {
    **{of: partial(norm, of) for of in (F.layer_norm, F.group_norm)},
    **{of: partial(narrow, of) for of in PRODUCTS},
    **{of: partial(wide, of) for of in LOSSES},
}
