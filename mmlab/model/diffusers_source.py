"""Models of diffusers in folders and on the hub, alone or as parts of a pipeline: where they are, and reading them.

A pipeline is a folder with `model_index.json` and a folder for each part, such as `unet` and `vae`; `denoiser` is that
of the pipelines that `mmlab export` writes where diffusers has none. A source may be the
pipeline, or the part's own folder (`<pipeline>/unet`, also of a name on the hub).
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmlab.config.errors import ConfigError
from mmlab.model.checkpoint_files import HALF, PICKLED, SAFETENSORS, find, read_file, read_json, split_gguf
from mmlab.model.pretrained import on_meta

INDEX, CONFIG = "model_index.json", "config.json"
SCHEDULER = "scheduler/scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model"
VARIANTS = (None, "fp16")
"""Of a model's files, the first that is there: as it was trained, or rounded to half precision."""
TEXT_WEIGHTS = (SAFETENSORS, f"{SAFETENSORS}.index.json", PICKLED, f"{PICKLED}.index.json", HALF)

TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Place:
    """A model's folder: in a local folder, or in a repository on the hub.

    Attributes:
        root: local folder or name on the hub.
        sub: path of the model's folder in it, empty for the root itself.
        key: of the setting that names it, for messages.
        kind: of model that it should be, likewise.
    """

    root: str
    sub: str
    key: str
    kind: str

    def find(self, name: str) -> Path | None:
        """Where a file of the model is, None if there is none; a file on the hub is downloaded."""
        try:
            return find(self.root, f"{self.sub}/{name}".lstrip("/"))
        except OSError as error:
            raise self.error(error) from error

    def config(self, *classes: str) -> dict[str, Any]:
        """Return the model's config; raises ConfigError if it cannot be read, or is of none of the classes, if any."""
        path = self.find(CONFIG)
        if path is None or (fields := read_json(path)) is None:
            hub = "" if Path(self.root).exists() else ", or the hub cannot be reached"
            raise ConfigError(f"{self.key}={self} is not {self.kind}: it has no {CONFIG}{hub}.")
        if classes and (name := fields.get("_class_name", classes[0])) not in classes:
            raise ConfigError(f"{self.key}={self} is not {self.kind}: its class is {name}.")
        return fields

    def folder(self) -> str:
        """Return the local folder with the config, which on the hub is downloaded."""
        path = self.find(CONFIG)
        return str(self) if path is None else str(path.parent)

    def error(self, error: Exception) -> ConfigError:
        """Return a ConfigError with the reason of another error."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        # torch names the model in the first line, and what does not fit in the second.
        reason = lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]
        return ConfigError(f"{self.key}={self} is not {self.kind}: {reason}")

    def __str__(self) -> str:
        return f"{self.root}/{self.sub}".rstrip("/")


def place_of(source: str, names: Sequence[str], part: str, kind: str) -> Place:
    """Return where a model is.

    Args:
        source: of the part's settings: a model, or a pipeline.
        names: of the model's folder in pipelines, in the order in which they are tried.
        part: name of the part, for messages.
        kind: of model that it should be, with an article, likewise.

    Raises:
        ConfigError: a file, or a pipeline without such a model.
    """
    root, sub = _root(source)
    whole = Place(root, sub, f"model.{part}.source", kind)
    if Path(root).is_file():
        raise ConfigError(
            f"{whole.key}={source} is a file, not a folder of diffusers; of a whole pipeline in one file, "
            "StableDiffusionPipeline.from_single_file and save_pretrained write the folder."
        )
    if sub or whole.find(CONFIG) is not None or (index := whole.find(INDEX)) is None:
        return whole
    entries = read_json(index) or {}
    has = {name for name, entry in entries.items() if isinstance(entry, list) and entry and entry[0] is not None}
    for name in names:
        if name in has:
            return Place(root, name, whole.key, kind)
    pipeline = entries.get("_class_name", "pipeline")
    parts = ", ".join(sorted(has)) or "no parts"
    raise ConfigError(f"{whole.key}={source} is a {pipeline} without {' or '.join(names)}; it has {parts}.")


def reads_config(settings: Any) -> bool:
    """Whether the config of a part's source is read: on the meta device, which is to count parameters, not from the hub
    where the settings have an `architecture`."""
    return not (on_meta() and settings.architecture) or Path(str(settings.source)).expanduser().exists()


def pipeline_of(source: str) -> Place | None:
    """Return the pipeline that a source is, None for a single model or a part's own folder."""
    root, sub = _root(source)
    whole = Place(root, sub, "source", "a pipeline")
    return whole if not sub and whole.find(CONFIG) is None and whole.find(INDEX) is not None else None


def scheduler_of(source: str) -> dict[str, Any]:
    """Return the scheduler's config of the pipeline that a source is; empty for anything else.

    `time_scale`, from the scheduler's times to the denoiser's, is 1 but for pipelines that `mmlab export` writes.
    """
    pipeline = pipeline_of(source)
    if pipeline is None:
        return {}
    scheduler, index = ((path and read_json(path)) or {} for path in (pipeline.find(SCHEDULER), pipeline.find(INDEX)))
    return {**scheduler, "time_scale": index.get("time_scale", 1)} if scheduler else {}


def text_place(source: str, part: str) -> Place | None:
    """Return where the text encoder of a pipeline is, None for a source that is no pipeline, nor a folder in one."""
    if split_gguf(source)[1]:
        return None
    try:
        inside = bool(_root(source)[1]) or pipeline_of(source) is not None
    except ConfigError:  # said by whoever reads the source
        return None
    return place_of(source, ("text_encoder",), part, "a text encoder") if inside else None


def fetch_text(place: Place) -> str:
    """Return the local folder of a text encoder with its weights, which on the hub are downloaded."""
    if Path(place.root).is_dir():
        return str(place)
    for name in TEXT_WEIGHTS:
        path = place.find(name)
        if path is not None and name.endswith("index.json"):
            for shard in sorted(set(json.loads(path.read_text())["weight_map"].values())):
                place.find(shard)
        if path is not None:
            break
    return place.folder()


def tokenizer_folder(place: Place) -> str:
    """Return the local folder of the tokenizer beside a text encoder, which on the hub is downloaded.

    Raises:
        ConfigError: there is none.
    """
    beside = replace(place, sub=f"{place.sub.rpartition('/')[0]}/tokenizer".lstrip("/"))
    paths = [path for name in TOKENIZER if (path := beside.find(name)) is not None]
    if not paths:
        part = place.key.removesuffix(".source")
        raise ConfigError(f"{place.key}={place.root} has a text encoder and no tokenizer; set {part}.tokenizer.")
    return str(paths[0].parent)


def read_model(kind: Any, place: Place) -> tuple[nn.Module, Mapping[str, Any]]:
    """Load a model of diffusers in fp32, complete, only from safetensors, whole or in shards.

    Args:
        kind: its class.
        place: of its folder.

    Returns:
        The model, and its config.

    Raises:
        ConfigError: it cannot be read, or weights are missing.
    """
    from diffusers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    options: dict[str, Any] = {"use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    variant = _variant(place)
    with readable(place), torch.device("cpu"):
        loaded: Any = kind.from_pretrained(
            place.root,
            subfolder=place.sub or None,
            variant=variant,
            torch_dtype=torch.float32,
            **options,
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"{place.key}={place} does not fill the model: {len(missing)} weights are missing, such as {missing[0]}."
        )
    return model, model.config


def _variant(place: Place) -> str | None:
    """Return the first variant of a model's files that is there; raises ConfigError if there is none, or damaged."""
    if not Path(place.root).is_dir():
        return None  # nothing is downloaded to be looked at
    for variant in VARIANTS:
        end = f".{variant}" if variant else ""
        if any(place.find(f"{WEIGHTS}{name}") for name in (f"{end}.safetensors", f".safetensors.index{end}.json")):
            with readable(place):
                for path in Path(str(place)).glob(f"{WEIGHTS}*.safetensors"):
                    if (".fp16" in path.name) == (variant is not None):
                        read_file(path, ())
            return variant
    pickled = any(Path(str(place)).glob(f"{WEIGHTS}*.bin"))
    hint = ", only a pickle (.bin), which is not read; load it by diffusers, and write it with save_pretrained"
    raise place.error(ValueError(f"it has no {WEIGHTS}.safetensors{hint * pickled}."))


@contextmanager
def readable(place: Place) -> Iterator[None]:
    """Turn the errors of diffusers about a source into ConfigError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise place.error(error) from error


def _root(source: str) -> tuple[str, str]:
    """Return (local folder or name on the hub, path in it); names on the hub have an owner and a name."""
    path = Path(source).expanduser()
    words = source.split("/")
    if path.exists() or len(words) < 3 or source.startswith((".", "/", "~")):
        return str(path) if path.exists() else source, ""
    return "/".join(words[:2]), "/".join(words[2:])
