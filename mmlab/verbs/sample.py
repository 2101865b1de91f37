"""Draw images with a trained generative model."""

import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mmlab.config.compose import hydra_verb

CONDITIONS = {"class": "label", "text": "prompt", "map": "map"}
"""What a model's conditioner reads → the key that gives it."""
EXECUTION = ("root", "batch_size", "out", "trainer")
"""Keys that do not change the pictures."""


def main(argv: list[str]) -> int:
    return hydra_verb("sample", sample, argv)


def sample(cfg: DictConfig) -> None:
    """Draw images, each from its own seed; write them with a grid, a strip of intermediate steps, and samples.json.

    mmlab sample run=emoji/class label=nature
    mmlab sample run=emoji/class label=[nature,people] sampler=dpmpp_2m steps=20 guidance=3
    mmlab sample run=emoji/text "prompt='red heart, love'" count=4 seed=100
    mmlab sample run=emoji/class label=nature ema=0.05          # averaged weights, of a run with callbacks.posthoc_ema
    mmlab sample run=emoji/prior label=food guidance=2 top_k=100 top_p=0.95 temperature=0.9
    mmlab sample run=emoji/class label=nature size=[48,24]                    # height, width: one of its buckets
    mmlab sample run=emoji/text "prompt='red heart'" image=heart.png strength=0.6         # image to image
    mmlab sample run=emoji/text "prompt='red heart'" image=heart.png mask=mask.png        # redraws what is white
    """
    import torch

    from mmlab.config.build import build
    from mmlab.config.errors import ConfigError
    from mmlab.data.sample_types import ImageSpec
    from mmlab.evaluate.pictures.generators import conditions
    from mmlab.evaluate.pictures.sample_files import draw_files
    from mmlab.evaluate.pictures.source_images import source_images
    from mmlab.runs.disk import write_json
    from mmlab.runs.run import find_run, load_run_config
    from mmlab.stage.assembly import kind_of
    from mmlab.training.trainer import place
    from mmlab.verbs._generators import (
        check_guidance,
        chosen_average,
        generator_of,
        generator_settings,
        restore_with,
        shape_of,
        source_settings,
    )

    folder = find_run(cfg.run, cfg.root)
    trained = load_run_config(folder)
    if kind_of(trained) != "draws":
        raise ConfigError(
            f"{cfg.run} is not a generative model; choose a run of stage=latent_diffusion or stage=code_prior."
        )
    # Everything that can be wrong is reported before weights are loaded.
    process, sampler, about = generator_settings(cfg, trained)
    shape = shape_of(cfg.size, trained)
    images, masks, strength = source_settings(cfg, sampler)
    about |= {"strength": strength} if images else {}
    with torch.device("meta"):
        conditioner = build(trained.model.conditioner)
    requests = requested(cfg, conditioner)
    check_guidance(cfg.run, about.get("guidance", 1), conditioner, trained)
    buckets = (shape,) if shape[0] != shape[1] else ()
    spec = ImageSpec(shape[0], trained.data.aspect, reduce_jpegs=trained.data.reduce_jpegs, buckets=buckets)
    if conditioner.reads == "map":
        conditions(conditioner, requests, len(requests), spec)
    sources = source_images(images, masks, cfg.count, spec)
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    out = out_folder(cfg.out, folder / "samples", settings)

    average = chosen_average(cfg, folder)
    about |= {} if average is None else {"ema": average.width}
    model = restore_with(average, folder)
    generator = generator_of(place(model, cfg.trainer), trained, process, sampler, shape, strength)
    inputs, words = conditions(generator.model.conditioner, requests, cfg.count, spec)
    inputs |= sources
    cut = warn_of_cuts(generator.model.conditioner, words)
    title = f"{cfg.run}: {', '.join(f'{name} {value}' for name, value in about.items() if value is not None)}"
    files = draw_files(generator, inputs, words, cfg.seed, out, cfg.batch_size, cfg.strip, title)
    pictures = described(files, cfg.seed, words, cut, {"image": images, "mask": masks})
    record = {"run": folder.name, **about, "settings": settings, "pictures": pictures}
    write_json(out / "samples.json", record, indent=2, ascii=False)
    print(f"pictures: {out / 'grid.png'}{f', {out}/strip.png' if cfg.strip else ''}")


def described(
    files: list[str], seed: int, words: list[str], cut: dict[str, str], sources: dict[str, list[str]]
) -> list[dict[str, Any]]:
    """What samples.json says of each picture.

    Args:
        files: of the pictures.
        seed: of the first one.
        words: the condition of each.
        cut: of `warn_of_cuts`.
        sources: key → files that the pictures were drawn from in turn; empty if they were not.
    """
    pictures: list[dict[str, Any]] = []
    for n, (file, text) in enumerate(zip(files, words, strict=True)):
        picture = {"file": file, "seed": seed + n, "condition": text}
        picture |= {key: names[n % len(names)] for key, names in sources.items() if names}
        pictures.append(picture | ({"cut": cut[text]} if cut else {}))
    return pictures


def warn_of_cuts(conditioner: Any, words: list[str]) -> dict[str, str]:
    """Print what the text encoder does not read of each text; return it by text, or nothing if all is read."""
    if conditioner.reads != "text":
        return {}
    cut = {text: conditioner.cut(text) for text in dict.fromkeys(words)}
    for text, rest in cut.items():
        if rest:
            print(
                f"WARNING: the text encoder reads {conditioner.max_length} tokens (model.conditioner.max_length); of "
                f"{text!r} it does not read {rest!r}.",
                file=sys.stderr,
            )
    return cut if any(cut.values()) else {}


def requested(cfg: DictConfig, conditioner: Any) -> list[str | int]:
    """The conditions to draw: classes, texts or maps; empty for all classes in turn, or for an unconditional model.

    Raises:
        ConfigError: the model takes another kind of condition, needs one, or does not have the class; or an empty list.
    """
    from mmlab.config.errors import ConfigError

    key = CONDITIONS.get(conditioner.reads)
    for other in CONDITIONS.values():
        if other != key and cfg[other] is not None:
            reason = f"takes {key}, not {other}" if key else f"is unconditional; leave out {other}"
            raise ConfigError(f"{cfg.run} {reason}.")
    if key is None:
        return []
    if key != "label" and cfg[key] is None:
        raise ConfigError(f"{cfg.run} is {conditioner.reads}-conditional; set {key}=…")
    requests = [] if cfg[key] is None else list(cfg[key]) if OmegaConf.is_list(cfg[key]) else [cfg[key]]
    if cfg[key] is not None and not (requests and all(isinstance(one, str | int | float) for one in requests)):
        kind = {"label": "a class", "prompt": "a text", "map": "a file"}[key]
        raise ConfigError(f"{key}={cfg[key]} must be {kind}, or a list of at least one.")
    for name in requests if key == "label" else []:
        conditioner.index(name)
    return requests


def out_folder(out: str | None, root: Path, settings: dict[str, Any]) -> Path:
    """`out`, empty or with samples of the same settings; by default the first of `root`/1, 2, … that does not exist.

    Raises:
        ConfigError: the folder holds anything else.
    """
    from mmlab.config.errors import ConfigError
    from mmlab.runs.disk import no_file

    if out is None:
        return next(folder for n in range(1, 10**9) if not (folder := root / str(n)).exists())
    folder, record = no_file(Path(out)), Path(out, "samples.json")
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    if not record.is_file():
        raise ConfigError(f"{folder} is not empty; choose another out, or remove that folder.")
    before = json.loads(record.read_text(encoding="utf-8")).get("settings", {})
    for key in settings.keys() - set(EXECUTION):
        if before.get(key) != settings[key]:
            change = f"{key}={before.get(key)}, not {settings[key]}"
            raise ConfigError(f"{folder} holds samples with {change}; choose another out, or remove that folder.")
    return folder
