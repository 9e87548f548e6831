"""Fast paths. Each has a plain twin that gives the same numbers, and none is required."""

from .compiled_signs import use_compiler


__all__ = ["use_compiler"]
