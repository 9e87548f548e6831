"""A Hugging Face Hub on this machine, for the real client to push to and to load from.

Repositories are kept in memory, large files in a folder: as Git LFS objects or, with `xet`, in the store that hf_xet
itself keeps where its server is called `local://FOLDER`. One hub is either, not both.

As a script it prints what another shell has to `export`, and serves until Ctrl-C; FOLDER is a temporary one unless it
is given:

    python tests/local_hub.py [FOLDER] [--xet]
"""

import argparse
import contextlib
import os
import re
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from local_hub_routes import Answer, Request, as_json, refusal, route
from local_hub_storage import HubError, LargeFiles, Repository


class LocalHub:
    """A Hub that serves inside a `with` block, at `url`.

    Attributes:
        user: Owner of the repositories.
        token: With which everything is allowed.
        readers: Tokens with which everything may be read; who writes with one is answered 403.
        dies_at: Given the line of a request, such as "POST /api/models/tester/lstm/commit/main", whether the server
            dies of it: it drops all connections, this one without an answer, and refuses others until `revive()`.
            Used up by its first match.
        busy: To how many of the next commits somebody else is quicker; they are answered 412.
        log: The line of every request that arrived.
    """

    def __init__(self, folder: str | os.PathLike, *, user: str = "tester", xet: bool = False):
        self.user, self.token, self.readers = user, f"hf_{os.urandom(8).hex()}", {f"hf_{os.urandom(8).hex()}"}
        self.large_files = LargeFiles(Path(folder), xet=xet)
        self.repositories: dict[tuple[str, str], Repository] = {}  # by kind ("models", …) and "owner/name"
        self.dies_at: Callable[[str], bool] | None = None
        self.busy = 0
        self.log: list[str] = []
        self.lock = threading.RLock()
        self.connections: set[socket.socket] = set()
        self.server: Server | None = None  # None while it is down
        self.port = 0  # any, at first

    def __enter__(self) -> "LocalHub":
        self.revive()
        return self

    def __exit__(self, *_) -> None:
        self.die()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def revive(self) -> None:
        """Serve, again at the same address and with all that is stored."""
        if self.server is None:
            self.server = Server(self)
            self.port = self.server.server_port
            threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def die(self) -> None:
        """Drop all connections and refuse others, until `revive()`."""
        with self.lock:
            if self.server is None:
                return
            self.server.shutdown()
            self.server.server_close()
            self.server = None
            for connection in list(self.connections):
                with contextlib.suppress(OSError):  # its client was quicker
                    connection.shutdown(socket.SHUT_RDWR)

    def arrived(self, line: str) -> None:
        """Note a request, and die of it if `dies_at` says so."""
        with self.lock:
            self.log.append(line)
            if self.dies_at is not None and self.dies_at(line):
                self.dies_at = None
                self.die()

    def role(self, token: str) -> str:
        """What a token allows: "write", "read", or nothing where there is none."""
        if token and token != self.token and token not in self.readers:
            raise HubError(401, "Invalid credentials in Authorization header")
        return "write" if token == self.token else "read" if token else ""

    def files(self, name: str, revision: str = "main", *, kind: str = "models") -> dict[str, bytes]:
        """The bytes of every file of a repository."""
        with self.lock:
            files, large = self.repositories[kind, name].files(revision), self.large_files
            return {path: large.path(e).read_bytes() if e.sha256 else e.content for path, e in files.items()}


class Handler(BaseHTTPRequestHandler):
    """One connection of a client, of which every request is answered in turn."""

    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.hub: LocalHub = self.server.hub
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_) -> None:
        """The hub keeps its own log."""

    def do_GET(self) -> None:
        self.hub.arrived(f"{self.command} {unquote(self.path)}")
        body = self.read_body()
        with self.hub.lock:
            if self.hub.server is not self.server:  # it died
                self.close_connection = True
                return
            answer = self.answer(body)
        self.send(answer)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, body: bytes) -> Answer:
        address = urlsplit(self.path)
        try:
            role = self.hub.role(self.headers.get("Authorization", "").removeprefix("Bearer "))
            method = "GET" if self.command == "HEAD" else self.command
            function, needed, parts = route(f"{method} {address.path}")
            request = Request(self.hub, self.command, role, parts, parse_qs(address.query), body)
            if needed == "write":
                request.allow("write")
            return function(request)
        except HubError as error:
            return refusal(error)
        except Exception as error:  # a server lives on; the client's own error then shows where to look
            traceback.print_exc()
            return as_json({"error": repr(error)}, 500)

    def send(self, answer: Answer) -> None:
        """Send an answer, or the part of it that a `Range` asks for."""
        content = answer.body.read_bytes() if isinstance(answer.body, Path) else answer.body
        status, headers, size = answer.status, dict(answer.headers), len(content)
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part and "Accept-Ranges" in headers:
            start, stop = int(part[1]), min(int(part[2] or size - 1) + 1, size)
            status, content = (206, content[start:stop]) if start < size else (416, b"")
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}" if start < size else f"bytes */{size}"
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class Server(ThreadingHTTPServer):
    """The server of a hub while it lives."""

    def __init__(self, hub: LocalHub):
        self.hub = hub
        super().__init__(("127.0.0.1", hub.port), Handler)

    def handle_error(self, request, client_address) -> None:
        """Say nothing of a connection that the client or `die` has cut."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A Hugging Face Hub on this machine.")
    parser.add_argument("folder", nargs="?", help="of the large files; a temporary one by default")
    parser.add_argument("--xet", action="store_true", help="large files go through hf_xet instead of Git LFS")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or stack.enter_context(tempfile.TemporaryDirectory())
        hub = stack.enter_context(LocalHub(folder, xet=arguments.xet))
        way = f"HF_HUB_DISABLE_XET={int(not arguments.xet)}"
        print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={hub.token} {way}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
