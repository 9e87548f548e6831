"""On which device a kernel is launched."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Inside, Triton launches on the tensor's GPU, also where that is not CUDA's current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
