"""What a run's config refers to (tokenizers, weights, earlier runs), found from any working folder.

Paths in a config are as they were typed where the run was trained. A run may since have been used from another folder,
or been moved with the whole folder of runs.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from mmlab.runs.run import IDENTITY, find_run

TOKENIZERS = "tokenizers"
TOKENIZER_FILE = "tokenizer_config.json"


def tokenizer_folder(run: Path, module: str) -> Path:
    """Where a run keeps the tokenizer of a module of its model, such as `language`; empty: of the model itself."""
    return run / TOKENIZERS / (module or "model")


def starting_runs(cfg: DictConfig, folder: Path) -> list[Path]:
    """Return the runs in `stage.init_from` of a run: beside its folder, or where they were when it was trained.

    Args:
        cfg: the run's config.
        folder: the run's folder.

    Raises:
        ConfigError: one of them is gone.
    """
    return [_run(name, cfg, folder) for name in cfg.stage.init_from]


def locate_files(cfg: DictConfig, folder: Path) -> None:
    """Point, in place, every `tokenizer` and local `source` of a run's model to where it is now.

    A tokenizer is the copy in the run's own folder, if there is one, and in the artifacts of the runs that it started
    from if the path leads nowhere. A path that is found nowhere stays, as does a name on the hub.

    Args:
        cfg: the run's config.
        folder: the run's folder.
    """
    for where, node in _nodes(cfg.model, ""):
        if "source" in node and isinstance(node.source, str):
            node.source = str(_file(node.source, cfg, folder) or node.source)
        if "tokenizer" in node:
            node.tokenizer = _tokenizer(where, node.tokenizer, cfg, folder)


def _tokenizer(where: str, value: str | None, cfg: DictConfig, folder: Path) -> str | None:
    part = where.split(".")[0]
    for kept in (tokenizer_folder(folder, where), folder / "artifacts" / part):
        if (kept / TOKENIZER_FILE).is_file():
            return str(kept)
    if value is None:
        return None
    if (path := _file(value, cfg, folder)) is not None:
        return str(path)
    for run in reversed(starting_runs(cfg, folder)):
        if (run / "artifacts" / part / TOKENIZER_FILE).is_file():
            return str(run / "artifacts" / part)
    return value


def _run(name: str, cfg: DictConfig, folder: Path) -> Path:
    places = [folder.parent, *(origin / cfg.run.root for origin in _origins(cfg, folder))]
    candidates = [place / each for place in places for each in (name, name.replace("/", "-"))]
    candidates[:0] = _moved(name, cfg, folder)
    return next((path for path in candidates if (path / "config.yaml").is_file()), None) or find_run(name, cfg.run.root)


def _file(value: str, cfg: DictConfig, folder: Path) -> Path | None:
    """Where a path of the config is now, None if nowhere or if it is relative to the present working folder."""
    path = Path(value).expanduser()
    places = [*_moved(path, cfg, folder), *(origin / path for origin in _origins(cfg, folder))]
    return next((place for place in places if place.exists()), None)


def _moved(path: str | Path, cfg: DictConfig, folder: Path) -> list[Path]:
    """Where a path in this run's folder, or in the folder of all runs, is now; empty for any other path."""
    for origin in (Path(), *_origins(cfg, folder)):
        for before, now in ((cfg.run.dir, folder), (cfg.run.root, folder.parent)):
            if (origin / path).is_relative_to(origin / before):
                return [now / (origin / path).relative_to(origin / before)]
    return []


def _origins(cfg: DictConfig, folder: Path) -> Iterator[Path]:
    """The working folder in which the run was trained: as its own path shows, and as it was recorded."""
    own, trained = folder.resolve(), Path(cfg.run.dir)
    if not trained.is_absolute() and own.parts[-len(trained.parts) :] == trained.parts:
        yield own.parents[len(trained.parts) - 1]
    try:
        recorded = json.loads((folder / IDENTITY).read_text(encoding="utf-8")).get("cwd")
    except (OSError, ValueError):
        recorded = None
    if recorded:
        yield Path(recorded)


def _nodes(node: DictConfig, where: str) -> Iterator[tuple[str, DictConfig]]:
    """Yield the dotted key and the node of every section of a model."""
    yield where, node
    for key, value in node.items():
        if isinstance(value, DictConfig) and key != "architecture":
            yield from _nodes(value, f"{where}.{key}".lstrip("."))
