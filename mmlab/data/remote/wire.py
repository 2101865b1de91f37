"""What the fetcher of a cache folder and its clients have in common: a Unix socket with lines of JSON."""

import hashlib
import json
import os
import re
import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROTOCOL = 1
SOCKET, LOCK, LOG = "socket", "lock", "fetcher.log"
"""Names of the fetcher's own files in the cache folder."""
_LONGEST = 100  # bytes of a socket's path; Linux allows 107, other systems 103
_STORE_SETTINGS = re.compile(
    r"(?!AWS_BATCH_|AWS_EXECUTION_ENV)"  # they tell which job this is
    r"((AWS|AZURE|GOOGLE|GCS|GCLOUD|CLOUDSDK|S3|MINIO|FSSPEC|OBJECT_STORE)_.*|SSL_CERT_(FILE|DIR)"
    r"|HF_TOKEN|HF_ENDPOINT|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|(HTTPS?|ALL|NO)_PROXY|BOTO_CONFIG)",
    re.IGNORECASE,
)


class Wire:
    """One end of a connection. Every message is one line; bytes may follow it, whose number it states as `follows`.

    Raises:
        OSError: the other end is gone; EOFError where it ended within a message.
    """

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self._file = connection.makefile("rb")

    def send(self, message: dict[str, Any], data: bytes = b"") -> None:
        """Send a message and the bytes that follow it."""
        line = json.dumps({**message, "follows": len(data)} if data else message, allow_nan=False)
        self.socket.sendall(line.encode() + b"\n" + data)

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """Wait for a message and the bytes that follow it."""
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        message = json.loads(line)
        data = self._file.read(message.get("follows", 0))
        if len(data) != message.get("follows", 0):
            raise EOFError
        return message, data

    def ended(self) -> bool:
        """Whether the other end is gone, at a time when no answer is expected."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close this process's end; it stays open in processes that inherited it."""
        self._file.close()
        self.socket.close()


@contextmanager
def socket_address(folder: Path) -> Iterator[str]:
    """The address of the socket in a cache folder, valid within the block; paths of sockets are limited to 107 bytes.

    Raises:
        OSError: there is no folder.
    """
    path = folder / SOCKET
    if len(os.fsencode(path)) <= _LONGEST:
        yield str(path)
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)


def store_settings() -> str:
    """A hash of all variables of the environment that tell how and as whom object stores are reached."""
    named = sorted(f"{name}={value}" for name, value in os.environ.items() if _STORE_SETTINGS.fullmatch(name))
    return hashlib.sha256("\0".join(named).encode(errors="surrogateescape")).hexdigest()
