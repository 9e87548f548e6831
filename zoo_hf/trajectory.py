"""The record of a run: what it started from and, for every step, its coefficients and learning rates.

A step is named by (seed, step, coefficients), so the file gives the trained weights from the starting ones without
data and without a forward pass.

The file is a signature, a frame with the header (JSON), and a frame for every step. A frame is the length of its body
and that length's CRC-32, the body, and a CRC-32 of the body that goes on from the frame before: a frame that was
changed, moved, doubled or taken out of another file does not follow from the one before it. Integers and floats are
little-endian.
"""

import contextlib
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .record import MOST_BYTES, Header, Step, TrajectoryError, parse_header


logger = logging.getLogger(__name__)

FILE_NAME = "trajectory.zoo"  # in the output directory of a run
SIGNATURE = b"ZOO-HF\x1a\n"  # no text file begins so, and none is taken for one
LENGTH = struct.Struct("<II")  # bytes of the body, and the CRC-32 of that number
CHECKSUM = struct.Struct("<I")


class Trajectory:
    """A trajectory file, whose header and steps have been found whole and in order.

    `Trajectory.open(path)` reads one, `Trajectory.create(path, header)` begins one. Iterating reads its steps.
    """

    def __init__(self, path: Path, header: Header, *, end: int, checksum: int, steps: int):
        self.path, self.header = path, header
        self.end, self.checksum, self.steps = end, checksum, steps  # of the last whole frame; how many steps

    @classmethod
    def create(cls, path: str | os.PathLike, header: Header) -> "Trajectory":
        """Begin a file; one that is there and has steps is moved aside, as `trajectory-1.zoo` or a later number.

        Raises:
            OSError: the file cannot be written.
        """
        path = Path(path)
        move_aside(path)
        body = header.pack_header()
        checksum = zlib.crc32(body, zlib.crc32(SIGNATURE))
        content = SIGNATURE + frame(body, checksum)
        path.write_bytes(content)
        return cls(path, header, end=len(content), checksum=checksum, steps=0)

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Trajectory":
        """Read and check a whole file; a last step that was not written to its end is left out, with a warning.

        Raises:
            TrajectoryError: names the file, the record and what is wrong with it.
            OSError: the file cannot be read.
        """
        path = Path(path)
        with path.open("rb") as file:
            frames = read_frames(file, path)
            header = next(frames, None)
            if header is None:
                raise TrajectoryError(f"{path}: its header was not written to the end, so that nothing is in it.")
            parsed = parse_header(header.body, path)
            found = cls(path, parsed, end=header.end, checksum=header.checksum, steps=0)
            for part, _ in found._steps(frames):
                found.end, found.checksum, found.steps = part.end, part.checksum, found.steps + 1
            torn = path.stat().st_size - found.end
        if torn > 0:
            logger.warning(f"{path}: the last step was not written to its end, and its {torn} bytes are left out.")
        return found

    @classmethod
    def find(cls, path: str | os.PathLike) -> "Trajectory | None":
        """`open`, or None where there is no file, or none with a whole header."""
        path = Path(path)
        if not path.exists():
            return None
        with path.open("rb") as file:
            if next(read_frames(file, path), None) is None:
                return None
        return cls.open(path)

    @property
    def stop(self) -> int:
        """Number of the step that comes next."""
        return self.header.first_step + self.steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Step]:
        with self.path.open("rb") as file:
            frames = read_frames(file, self.path)
            next(frames)
            steps = self._steps(frames)
            for number in range(self.steps):
                found = next(steps, None)
                if found is None:
                    raise TrajectoryError(f"{self.path}: it has {number} steps now, and had {self.steps}.")
                yield found[1]

    def _steps(self, frames: "Iterator[Frame]") -> "Iterator[tuple[Frame, Step]]":
        """Every further frame, and the step in it."""
        for number, found in enumerate(frames, self.header.first_step):
            try:
                step = self.header.unpack(found.body)
            except ValueError as error:
                raise TrajectoryError(f"{self.path}: the record of step {number} makes no sense: {error}.") from error
            if step.step != number:
                raise TrajectoryError(f"{self.path}: step {step.step} stands where step {number} should.")
            yield found, step

    def verify(self) -> None:
        """Read the file once more.

        Raises:
            TrajectoryError: something in it is not as it was written.
        """
        again = Trajectory.open(self.path)
        if (again.end, again.checksum) != (self.end, self.checksum):
            raise TrajectoryError(f"{self.path}: it has {again.steps} steps now, and had {self.steps}.")

    def append(self, step: Step) -> None:
        """Write a step, at once and in one piece.

        Raises:
            TrajectoryError: it is not the next step, or has other numbers of coefficients or rates than the header.
            OSError: it could not be written; the file ends with the step before.
        """
        if step.step != self.stop:
            raise TrajectoryError(f"{self.path}: step {step.step} is not what can follow step {self.stop - 1}.")
        try:
            body = self.header.pack(step)
            self.header.unpack(body)
        except (ValueError, struct.error) as error:
            raise TrajectoryError(f"{self.path}: step {step.step} cannot be recorded: {error}.") from error
        checksum = zlib.crc32(body, self.checksum)
        content = frame(body, checksum)
        with self.path.open("r+b", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != self.end:
                self._take_torn_(file)
            try:
                file.seek(self.end)
                while content:
                    content = content[file.write(content) :]  # where a part is written, the rest tells why
            except OSError as error:
                with contextlib.suppress(OSError):  # reading leaves out what was written of a step
                    file.truncate(self.end)
                message = f"step {step.step} could not be recorded and was not made ({error.strerror})"
                raise OSError(error.errno, message, str(self.path)) from error
            self.end, self.checksum, self.steps = file.tell(), checksum, self.steps + 1

    def _take_torn_(self, file: BinaryIO) -> None:
        """Drop a last step that was not written to its end.

        Raises:
            TrajectoryError: what follows the last step is whole.
        """
        if Trajectory.open(self.path).end != self.end:
            raise TrajectoryError(f"{self.path}: something else has written to it since step {self.stop - 1}.")
        file.truncate(self.end)

    def cut(self, stop: int) -> None:
        """Drop step `stop` and all later ones, also from the file."""
        with self.path.open("r+b") as file:
            frames = read_frames(file, self.path)
            header = next(frames)
            self.end, self.checksum, self.steps = header.end, header.checksum, 0
            for found, step in self._steps(frames):
                if step.step >= stop:
                    break
                self.end, self.checksum, self.steps = found.end, found.checksum, self.steps + 1
            file.truncate(self.end)


class Frame(NamedTuple):
    """A whole one."""

    body: bytes
    end: int  # its last byte's place in the file, plus one
    checksum: int  # of all bodies so far


def frame(body: bytes, checksum: int) -> bytes:
    """A body with its length before it and its checksum behind it."""
    length = len(body).to_bytes(4, "little")
    return length + CHECKSUM.pack(zlib.crc32(length)) + body + CHECKSUM.pack(checksum)


def read_frames(file: BinaryIO, path: Path) -> Iterator[Frame]:
    """The whole frames of a file; it ends silently before one that was not written to its end.

    Raises:
        TrajectoryError: the file is no trajectory, or a whole frame is not as it was written.
    """
    signature = file.read(len(SIGNATURE))
    if signature != SIGNATURE[: len(signature)]:
        raise TrajectoryError(f"{path}: this is no trajectory of zoo_hf.")
    checksum, size = zlib.crc32(SIGNATURE), path.stat().st_size
    for number in count():
        what = f"record {number - 1}" if number else "the header"
        prefix = file.read(LENGTH.size)
        if len(prefix) < LENGTH.size:
            return
        length, check = LENGTH.unpack(prefix)
        if zlib.crc32(prefix[:4]) != check:
            raise TrajectoryError(f"{path}: the length of {what} is corrupt.")
        if length > MOST_BYTES:
            raise TrajectoryError(
                f"{path}: {what} claims to have {length:,} bytes; none has more than {MOST_BYTES:,}."
            )
        end = file.tell() + length + CHECKSUM.size
        if end > size:
            return
        body = file.read(length)
        checksum = zlib.crc32(body, checksum)
        if CHECKSUM.unpack(file.read(CHECKSUM.size))[0] != checksum:
            raise TrajectoryError(f"{path}: the checksum of {what} is wrong: it was changed, moved or written twice.")
        yield Frame(body, end, checksum)


def move_aside(path: Path) -> None:
    """Rename a file that is there, to its name with the first free number; one without any step is left."""
    if not path.exists():
        return
    try:
        found = Trajectory.find(path)
        if found is None or len(found) == 0:
            return
    except TrajectoryError:
        pass  # whatever it is, it is kept
    aside = next(p for number in count(1) if not (p := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists())
    path.rename(aside)
    logger.info(f"{path} is from another run, and is kept as {aside.name}.")
