"""What the hub of `local_hub.py` stores: the commits of its repositories, and large files in a folder."""

import hashlib
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


LARGE_BYTES = 10 * 2**20  # a larger file is no part of the git repository
LARGE_SUFFIXES = {".arrow", ".bin", ".h5", ".npz", ".onnx", ".parquet", ".pickle", ".pt", ".pth", ".safetensors"}
XET_RECORD = 48  # bytes of every record in a shard


class HubError(Exception):
    """What is wrong with a request; the client tells its errors apart by status and code."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def git_name(content: bytes) -> str:
    """The name that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str, size: int) -> bool:
    return size > LARGE_BYTES or Path(path).suffix in LARGE_SUFFIXES


class Entry(NamedTuple):
    """A file of a commit: its bytes, or the SHA-256 under which they were uploaded."""

    oid: str
    size: int
    content: bytes = b""
    sha256: str = ""
    pointer_size: int = 0
    xet_hash: str = ""

    @classmethod
    def regular(cls, content: bytes) -> "Entry":
        return cls(git_name(content), len(content), content)

    @classmethod
    def large(cls, sha256: str, size: int, xet_hash: str) -> "Entry":
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return cls(git_name(pointer), size, b"", sha256, len(pointer), xet_hash)

    def described(self, path: str) -> dict:
        """The entry as the Hub lists it."""
        fields = {"type": "file", "path": path, "oid": self.oid, "size": self.size}
        if self.sha256:
            fields["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": self.pointer_size}
        return fields | ({"xetHash": self.xet_hash} if self.xet_hash else {})


class Commit(NamedTuple):
    files: dict[str, Entry]
    title: str
    parent: str | None
    date: str


class Repository:
    """Commits by their name, and the branches, tags and pull requests that point at them."""

    def __init__(self, *, private: bool):
        self.private, self.pull_requests = private, 0
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}  # also the pull requests, as `refs/pr/1`
        self.tags: dict[str, str] = {}
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LARGE_SUFFIXES))
        self.add("main", {".gitattributes": Entry.regular(attributes.encode())}, "initial commit")

    def add(self, branch: str, files: dict[str, Entry], title: str, parent: str | None = None) -> str:
        """Name of a new commit, at which the branch points from now on."""
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        name = hashlib.sha1(repr([sorted(files.items()), title, parent, time.time_ns()]).encode()).hexdigest()
        self.commits[name] = Commit(files, title, parent, date)
        self.branches[branch] = name
        return name

    def resolve(self, revision: str) -> str:
        """Name of the commit of a branch, a tag or a commit."""
        name = self.branches.get(revision) or self.tags.get(revision) or revision
        if name not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return name

    def files(self, revision: str) -> dict[str, Entry]:
        return self.commits[self.resolve(revision)].files


class LargeFiles:
    """Uploaded files by their SHA-256, in a folder."""

    def __init__(self, folder: Path, *, xet: bool):
        self.folder, self.xet = folder / "lfs", xet
        self.address = f"local://{folder.resolve() / 'xet'}"  # hf_xet takes it for its server
        self.folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, sha256: str) -> bool:
        return (self.folder / sha256).exists()

    def write(self, sha256: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != sha256:
            raise HubError(400, f"The bytes are not those of {sha256}.")
        unfinished = self.folder / f".{sha256}.{threading.get_ident()}"
        unfinished.write_bytes(content)
        unfinished.replace(self.folder / sha256)

    def entry(self, sha256: str, size: int) -> Entry:
        """The entry of a file that was uploaded."""
        xet_hash = self.xet_hash(sha256) if self.xet else ""
        if not xet_hash and sha256 not in self:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        return Entry.large(sha256, size, xet_hash)

    def path(self, entry: Entry) -> Path:
        """Where the file lies; one that only hf_xet has is fetched from it."""
        path = self.folder / entry.sha256
        if entry.xet_hash and not path.exists():
            from hf_xet import XetFileInfo, XetSession

            with XetSession().new_file_download_group(endpoint=self.address) as group:
                group.start_download_file(XetFileInfo(entry.xet_hash, entry.size), str(path))
        return path

    def xet_hash(self, sha256: str) -> str:
        """hf_xet's name of a file, or an empty one where it was not uploaded so."""
        shards = Path(self.address.removeprefix("local://")).rglob("*.mdb")
        return next((name for shard in shards for name, sha in read_shard(shard.read_bytes()) if sha == sha256), "")


def read_shard(shard: bytes) -> Iterator[tuple[str, str]]:
    """hf_xet's name and the SHA-256 of every file in one of its shards.

    After a header, a file is a record with its name, flags and a number n, then n records of its parts, n of their
    checksums if the highest flag is set, and one with the SHA-256 if the second is. A name of ones ends the files.
    """
    start = XET_RECORD
    while start + XET_RECORD <= len(shard) and shard[start : start + 32] != b"\xff" * 32:
        name = shard[start : start + 32]
        flags, parts = struct.unpack_from("<II", shard, start + 32)
        start += XET_RECORD * (1 + parts * (2 if flags & 1 << 31 else 1))
        if flags & 1 << 30:
            yield as_written(name), as_written(shard[start : start + 32])
            start += XET_RECORD


def as_written(name: bytes) -> str:
    """A 32-byte hash as hf_xet writes it: four little-endian integers in hexadecimal."""
    return "".join(f"{part:016x}" for part in struct.unpack("<4Q", name))
