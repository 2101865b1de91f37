"""A Gradio page as a local server: its port, its temporary folder, and what its pages may load."""

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlab.config.errors import ConfigError
from mmlab.data.sample_types import SampleError
from mmlab.demo.visits import Visits

if TYPE_CHECKING:
    import uvicorn
    from gradio import Blocks

LARGEST_UPLOAD = "64mb"
"""A JPEG of the most pixels that are decoded takes less."""
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"
"""Content-Security-Policy: the page loads nothing from elsewhere, and no other page frames it."""
LOCAL = ["127.0.0.1", "localhost", "[::1]"]
"""This machine, as requests name it in their Host."""
STYLE = """
.pictures img {image-rendering: pixelated}
.pictures, .pictures .grid-wrap {height: auto !important; max-height: none !important; overflow: visible !important}
[aria-label=Share] {display: none !important} /* it would send a picture to a public host */
"""
KEPT = 3600
"""Seconds after which an upload that was never sent is deleted."""


def listen(host: str, port: int) -> socket.socket:
    """Open the port of a server; 0 is any free one.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise ConfigError(f"Port {port} of {host} cannot be opened ({reason}); give another port= or host=.") from error


@contextmanager
def upload_folder() -> Iterator[Path]:
    """A folder for uploads and pictures of the pages made meanwhile, deleted in the end, also after SIGTERM."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with tempfile.TemporaryDirectory(prefix="mmlab_demo_", ignore_cleanup_errors=True) as folder:
            os.environ["GRADIO_TEMP_DIR"] = folder
            yield Path(folder)
    finally:
        os.environ.pop("GRADIO_TEMP_DIR", None)
        signal.signal(signal.SIGTERM, before)


def take_uploads(paths: Sequence[str]) -> list[tuple[str, bytes]]:
    """Return names and bytes of uploaded files, and delete them.

    Gradio names a file after its contents, so a file that was uploaded twice is there once.

    Raises:
        SampleError: a file is gone: it waited too long, or another visitor has sent the same one.
    """
    files = {path: Path(path) for path in paths}
    try:
        data = {path: file.read_bytes() for path, file in files.items()}
    except FileNotFoundError as error:
        name = Path(str(error.filename)).name
        raise SampleError("pictures", f"{name} is no longer on the server; add it again.") from None
    finally:
        for file in files.values():
            file.unlink(missing_ok=True)
    return [(files[path].name, data[path]) for path in paths]


def server(page: "Blocks", visits: Visits, host: str) -> "uvicorn.Server":
    """A server of a page; `run(sockets=[…])` ends with Ctrl-C, and with it what is computed for the visitors."""
    import uvicorn
    from fastapi import FastAPI
    from gradio import mount_gradio_app
    from gradio.themes import Default
    from starlette.datastructures import MutableHeaders
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(openapi_url=None)
    theme = Default(primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate")
    mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        show_error=False,
        max_file_size=LARGEST_UPLOAD,
        theme=theme,
        css=STYLE,
    )
    mounted: Any = app.routes[-1]
    # Gradio's `launch` sets this; without it, paths that a client sends are not compared with the uploads.
    page.has_launched = True
    # A page elsewhere whose name was pointed here cannot use the browser to reach it.
    if host in LOCAL or f"[{host}]" in LOCAL:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL)

    async def with_policy(scope, receive, send):
        async def sent(message):
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        await app(scope, receive, sent)

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            visits.close()
            mounted.app.stop_event.set()  # ends the connections of open pages
            await super().shutdown(sockets)

    return Server(uvicorn.Config(with_policy, log_level="warning", timeout_graceful_shutdown=1))
