"""Every kernel as an H100 would run it: compiled for one, on whatever machine this is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPTS = Path(__file__).parent.parent / "scripts"
SHARED = 232_448  # bytes that a program may take of an H100's multiprocessor
REGISTERS = 65_536  # of a multiprocessor
SPILLED = 128  # bytes of a thread, which has 1,020 in registers: those of the largest tiles lie outside their loops
sys.path.append(str(SCRIPTS))  # nothing else imports by these names

from gpu_cases import CASES  # noqa: E402

from .conftest import needs_triton  # noqa: E402


# together those that compile about as long: importing what they need takes as long as compiling some of them
TOGETHER = ["linear", "scans embedding", "update displace", "head_loss", "low_rank_linear rwkv7 mamba2"]


def compiled(cases: str) -> dict[str, dict[str, int]]:
    """What kernels take, by a process that compiles them: here the interpreter is on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPTS / "gpu_code.py"), *cases.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout[done.stdout.index("{") :])


@needs_triton
@pytest.mark.parametrize(
    "cases", [*TOGETHER[1:3], *(pytest.param(cases, marks=pytest.mark.slow) for cases in (TOGETHER[0], *TOGETHER[3:]))]
)
def test_kernels_compile_for_an_h100_and_what_they_work_with_fits_into_it(cases):
    kernels = compiled(cases)
    assert len({name.split()[0] for name in kernels}) >= len(cases.split())
    for name, taken in kernels.items():
        assert taken["shared"] <= SHARED, (name, taken)
        assert taken["registers"] * taken["warps"] * 32 <= REGISTERS, (name, taken)
        assert taken["spilled"] <= SPILLED, (name, taken)


def test_every_case_is_compiled():
    assert sorted(" ".join(TOGETHER).split()) == sorted(CASES)
