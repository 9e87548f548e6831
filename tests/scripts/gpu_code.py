"""Compiles for an H100, on a machine without one, the kernels that operations launch; nothing runs.

    python tests/scripts/gpu_code.py displace …

prints for every kernel that the named cases launch, as JSON: its name, registers of a thread, bytes that a thread
spills, and bytes of shared memory.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import gpu_cases
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from zoo_hf.kernels import choice


class AnH100:
    """What Triton asks a driver for when it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling() -> Iterator[dict]:
    """Inside, Triton kernels are chosen for every tensor and a launch compiles: kernels by name and what they are."""
    run, kernels = JITFunction.run, {}

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.setdefault(f"{self.__name__} {kernel.hash[:8]}", kernel)
        return kernel

    driver.set_active(AnH100())
    JITFunction.run, choice.runs = compile_only, lambda name, *_, **__: name in ("plain", "torch", "triton")
    yield kernels


def resources(kernel) -> dict[str, int]:
    """What `ptxas` says of a kernel."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(kernel.asm["ptx"])
        ptx.flush()
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", ptx.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    return {
        "registers": int(registers.group(1)),
        "spilled": int(spilled.group(1)),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }


if __name__ == "__main__":
    with compiling() as kernels, torch.inference_mode():
        for case in sys.argv[1:]:
            gpu_cases.CASES[case]()
    print(json.dumps({name: resources(kernel) for name, kernel in kernels.items()}, indent=1))
