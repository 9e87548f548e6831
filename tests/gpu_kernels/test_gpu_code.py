"""Every kernel as an H100 would run it: compiled for one, on whatever machine this is."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest


SCRIPTS = Path(__file__).parent.parent / "scripts"
SHARED = 232_448  # bytes that a program may take of an H100's multiprocessor
REGISTERS = 65_536  # of a multiprocessor
SPILLED = 128  # bytes of a thread, which has 1,020 in registers: those of the largest tiles lie outside their loops
sys.path.append(str(SCRIPTS))  # nothing else imports by these names

from gpu_cases import CASES  # noqa: E402


@cache
def compiled(case: str) -> dict[str, dict[str, int]]:
    """What a case's kernels take, by a process that compiles them: here the interpreter is on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPTS / "gpu_code.py"), case]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_for_an_h100_and_fit_into_it(case):
    kernels = compiled(case)
    assert kernels
    for name, taken in kernels.items():
        assert taken["shared"] <= SHARED, (name, taken)
        assert taken["registers"] * taken["warps"] * 32 <= REGISTERS, (name, taken)


@pytest.mark.parametrize("case", CASES)
def test_what_a_thread_works_with_stays_in_registers(case):
    for name, taken in compiled(case).items():
        assert taken["spilled"] <= SPILLED, (name, taken)
