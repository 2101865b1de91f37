"""Draw pictures with a trained generative model."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mmlab.config.compose import hydra_verb

TOLD = {"class": "class", "text": "prompt", "map": "map"}
"""The key that says what a picture is to show, by what the model's conditioner reads."""
OF_NOISE, OF_CODES = ("steps",), ("temperature", "top_k", "top_p")
"""Keys that say how noise is taken away, and how codes are written."""
EXECUTION = ("root", "batch_size", "out", "trainer")
"""Keys that say where and how pictures are drawn, not which."""


def main(argv: list[str]) -> int:
    return hydra_verb("sample", sample, argv)


def sample(cfg: DictConfig) -> None:
    """Draw pictures, each from its own seed; write them with a grid, a strip of how they came about, and samples.json.

    mmlab sample run=emoji/class class=nature
    mmlab sample run=emoji/class class=[nature,people] sampler=dpmpp_2m steps=20 guidance=3
    mmlab sample run=emoji/text "prompt='red heart, love'" count=4 seed=100
    mmlab sample run=emoji/prior class=food guidance=2 top_k=100 top_p=0.95 temperature=0.9
    """
    import torch

    from mmlab.config.build import build
    from mmlab.config.errors import ConfigError
    from mmlab.data.sample import ImageSpec
    from mmlab.evaluate.pictures.generators import conditions
    from mmlab.evaluate.pictures.sample_files import draw_files
    from mmlab.runs.run import find_run, load_run_config
    from mmlab.stage.assembly import restore
    from mmlab.training.trainer import place

    folder = find_run(cfg.run, cfg.root)
    trained = load_run_config(folder)
    if trained.process is None and "prior" not in trained.model:
        raise ConfigError(
            f"{cfg.run} is no generative model, so it draws nothing; give a run of stage=latent_diffusion or"
            " stage=code_prior."
        )
    # All that can be wrong is said before weights are loaded.
    draw, about, size = (with_noise if trained.process is not None else with_codes)(cfg, trained, cfg.size)
    with torch.device("meta"):
        conditioner = build(trained.model.conditioner)
    asked = what_to_show(cfg, conditioner)
    check_guidance(cfg.run, about["guidance"], conditioner)
    spec = ImageSpec(size, trained.data.aspect)
    if conditioner.reads == "map":
        conditions(conditioner, asked, len(asked), spec)
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    out = out_folder(cfg.out, folder / "samples", settings)

    model, _ = restore(folder)
    generator = draw(place(model, cfg.trainer))
    given, words = conditions(generator.model.conditioner, asked, cfg.count, spec)
    title = f"{cfg.run}: {', '.join(f'{name} {value}' for name, value in about.items() if value is not None)}"
    files = draw_files(generator, given, words, cfg.seed, out, cfg.batch_size, cfg.strip, title)
    pictures = [{"file": file, "seed": cfg.seed + n, "told": words[n]} for n, file in enumerate(files)]
    written = {"run": folder.name, **about, "settings": settings, "pictures": pictures}
    (out / "samples.json").write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"pictures: {out / 'grid.png'}{f', {out}/strip.png' if cfg.strip else ''}")


def with_noise(
    cfg: DictConfig, trained: DictConfig, size: int | None = None
) -> tuple[Callable[[Any], Any], dict[str, Any], int]:
    """For a diffusion model: (model → its generator, the sampler's settings, side of the pictures).

    Raises:
        ConfigError: settings that it does not have.
    """
    from mmlab.config.build import build
    from mmlab.config.errors import ConfigError
    from mmlab.evaluate.pictures.generators import Generator
    from mmlab.stage.assembly import run_sampler

    refuse_keys(cfg, OF_CODES, "takes noise away")
    if size not in (None, trained.data.size):
        raise ConfigError(f"{cfg.run} draws pictures of {trained.data.size} px, as it was trained; leave out size=….")
    process, sampler = build(trained.process), run_sampler(trained, cfg.sampler, cfg.steps, cfg.guidance)
    process.grid(sampler.steps, sampler.spacing)
    about = {"sampler": sampler.name, "steps": sampler.steps, "guidance": sampler.guidance.scale}
    asked = trained.data.size
    return lambda model: Generator(model, process, sampler, asked), about, asked


def with_codes(
    cfg: DictConfig, trained: DictConfig, size: int | None = None
) -> tuple[Callable[[Any], Any], dict[str, Any], int]:
    """For a prior over codes: (model → its generator, the sampler's settings, side of the pictures).

    Raises:
        ConfigError: settings that it does not have, or pictures smaller than the trained ones.
    """
    from mmlab.config.errors import ConfigError
    from mmlab.evaluate.pictures.generators import CodeGenerator
    from mmlab.stage.assembly import run_code_sampler

    refuse_keys(cfg, OF_NOISE, "writes codes")
    given = {name: cfg[name] for name in ("temperature", "top_k", "top_p", "guidance")}
    sampler = run_code_sampler(trained, cfg.sampler, **given)
    asked = size or trained.data.size
    factor = trained.data.size // trained.model.prior.side
    if asked < trained.data.size or asked % factor:
        raise ConfigError(
            f"{cfg.run} has learned pictures of {trained.data.size} px; size={asked} must be as much or more, and a"
            f" multiple of {factor}."
        )
    return lambda model: CodeGenerator(model, sampler, asked), asdict(sampler), asked


def refuse_keys(cfg: DictConfig, keys: tuple[str, ...], does: str) -> None:
    """Refuse settings of the other kind of model, by name."""
    from mmlab.config.errors import ConfigError

    for key in keys:
        if cfg[key] is not None:
            raise ConfigError(f"{cfg.run} {does}, so {key}={cfg[key]} says nothing; leave it out.")


def what_to_show(cfg: DictConfig, conditioner: Any) -> list[str | int]:
    """Classes, a text or maps, as the model reads it; empty for all classes, or where it reads nothing.

    Raises:
        ConfigError: the model reads something else, does not know the class, or is told nothing.
    """
    from mmlab.config.errors import ConfigError

    key = TOLD.get(conditioner.reads)
    for other in TOLD.values():
        if other != key and cfg[other] is not None:
            takes = f"takes {key}=…, not {other}" if key else f"cannot be told what to show; leave out {other}"
            raise ConfigError(f"{cfg.run} {takes}=….")
    if key is None:
        return []
    if key == "prompt" and cfg.prompt is None:
        raise ConfigError(f"{cfg.run} draws what a text says; give prompt=…")
    if key == "map" and cfg.map is None:
        raise ConfigError(f"{cfg.run} draws what a map shows; give map=<file>.")
    asked = [] if cfg[key] is None else list(cfg[key]) if OmegaConf.is_list(cfg[key]) else [cfg[key]]
    for name in asked if key == "class" else []:
        conditioner.index(name)
    return asked


def check_guidance(run: str, scale: float, conditioner: Any) -> None:
    """Refuse what guides nowhere, and warn of guidance away from what may never have been trained."""
    import sys

    from mmlab.config.errors import ConfigError

    if scale == 1:
        return
    if conditioner.reads == "none":
        raise ConfigError(f"{run} is told nothing, so guidance={scale:g} has nothing to strengthen; give guidance=1.")
    if conditioner.dropout == 0:
        print(
            f"caution: {run} was trained with model.conditioner.dropout=0, so unless what it started from had learnt"
            f" to draw without a condition, guidance={scale:g} is of no use.",
            file=sys.stderr,
        )


def out_folder(asked: str | None, root: Path, settings: dict[str, Any]) -> Path:
    """A folder that is not there yet; one that was asked for may be empty, or hold samples of the same settings.

    Raises:
        ConfigError: the folder holds anything else.
    """
    from mmlab.config.errors import ConfigError
    from mmlab.runs.disk import no_file

    if asked is None:
        return next(folder for n in range(1, 10**9) if not (folder := root / str(n)).exists())
    out, record = no_file(Path(asked)), Path(asked, "samples.json")
    if not out.exists() or not any(out.iterdir()):
        return out
    if not record.is_file():
        raise ConfigError(f"{out} is not empty; give another out=…, or remove that folder.")
    before = json.loads(record.read_text(encoding="utf-8")).get("settings", {})
    for key in settings.keys() - set(EXECUTION):
        if before.get(key) != settings[key]:
            was = f"{key}={before.get(key)}, not {settings[key]}"
            raise ConfigError(f"{out} holds samples with {was}; give another out=…, or remove that folder.")
    return out
