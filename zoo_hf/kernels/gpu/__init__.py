"""Triton's kernels and what launches them, imported where they run: Triton is not installed everywhere."""
