"""A demo served from a thread of the tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

from mmlab.config.compose import compose
from mmlab.demo.serving import listen, server, upload_folder
from mmlab.verbs import demo

MARKUP = "<script>alert(1)</script> <b>bold</b>"


@contextmanager
def served(runs: Path, *overrides: str) -> Iterator[tuple[str, Path]]:
    """The address of a demo, and the folder of its uploads and pictures."""
    cfg = compose("demo", [*overrides, f"root={runs}", "port=0", "trainer.accelerator=cpu"])
    names = [cfg.run] if cfg.compare is None else [cfg.run, cfg.compare]
    make = demo.chat if demo.kind_of_page(names, cfg.root) == "chat" else demo.form
    with listen(cfg.host, cfg.port) as port, upload_folder() as folder:
        running = server(*make(cfg, names, folder), cfg.host)
        thread = Thread(target=running.run, kwargs={"sockets": [port]})
        thread.start()
        yield f"http://127.0.0.1:{port.getsockname()[1]}/", folder
        running.should_exit = True
        thread.join()
