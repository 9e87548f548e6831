"""Fast paths. Each has a plain twin that gives the same numbers, and none is required."""

from . import displace, embedding, head_loss, linear, low_rank_linear, mamba2, rwkv7, scan, sums  # noqa: F401
from .compiled_signs import use_compiler


__all__ = ["use_compiler"]
