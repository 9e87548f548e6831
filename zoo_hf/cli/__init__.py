"""The `zoo-hf` command, a file for each of its commands."""

from .command import main


__all__ = ["main"]
