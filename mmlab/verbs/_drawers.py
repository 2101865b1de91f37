"""Trained generative runs for the page of `mmlab demo`."""

from itertools import count
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mmlab.config.errors import ConfigError
from mmlab.demo.forms import Drawn, Form, OnStep
from mmlab.diffusion.config import SamplerConfig
from mmlab.evaluate.pictures.generators import conditions
from mmlab.evaluate.pictures.sample_files import draw_files
from mmlab.runs.run import find_run
from mmlab.stage.assembly import restore
from mmlab.training.config import HardwareConfig
from mmlab.training.trainer import place
from mmlab.verbs._generators import (
    buckets_of,
    check_guidance,
    generator_of,
    generator_settings,
    run_sampler,
    shape_of,
)
from mmlab.verbs.config import SampleConfig
from mmlab.verbs.sample import requested, warn_of_cuts

PRIOR_SIDES = (1, 1.5, 2)
"""Sizes of a code prior's images that the form offers, as multiples of the trained one."""


class RunDrawer:
    """See `mmlab.demo.forms.Drawer`.

    Args:
        run: name or folder of a trained run.
        root: the folder of all runs.
        hardware: where it draws.

    Raises:
        ConfigError: a run that draws from maps.
    """

    def __init__(self, run: str, root: str, hardware: HardwareConfig | DictConfig):
        self.name = run
        model, self.trained = restore(find_run(run, root))
        self.model = place(model, hardware)
        self.form = form_of(run, self.model.conditioner, self.trained)

    def __call__(self, settings: dict[str, Any], out: Path, on_step: OnStep) -> Drawn:
        cfg = self._config(settings)
        conditioner = self.model.conditioner
        process, sampler, about = generator_settings(cfg, self.trained)
        shape = shape_of(cfg.size, self.trained)
        requests = requested(cfg, conditioner)
        check_guidance(self.name, about.get("guidance", 1), conditioner, self.trained)
        generator = generator_of(self.model, self.trained, process, sampler, shape)
        inputs, words = conditions(conditioner, requests, cfg.count)
        cut = warn_of_cuts(conditioner, words)
        steps, done = -(-cfg.count // cfg.batch_size) * generator.steps, count(1)
        files = draw_files(
            generator,
            inputs,
            words,
            cfg.seed,
            out,
            cfg.batch_size,
            cfg.strip,
            self.name,
            lambda: on_step(next(done), steps),
        )
        captions = [f"seed {cfg.seed + n}{f': {word}' if word else ''}" for n, word in enumerate(words)]
        return Drawn([out / file for file in files], captions, out / "strip.png", "".join(cut.values()))

    def _config(self, settings: dict[str, Any]) -> Any:
        """The settings of the form as `mmlab sample` would have them."""
        given = {key: value for key, value in settings.items() if value not in (None, [])}
        if "sampler" in given:
            given["sampler"] = {"_target_": SamplerConfig._target_, "name": given["sampler"]}
        return OmegaConf.structured(SampleConfig(run=self.name, **given))


def form_of(run: str, conditioner: Any, trained: DictConfig) -> Form:
    """What a run can be asked for.

    Raises:
        ConfigError: it draws from maps.
    """
    if conditioner.reads == "map":
        raise ConfigError(
            f"{run} draws from maps; the demo has fields for classes and texts. Use mmlab sample run={run} map=<file>."
        )
    _, settings = run_sampler(trained)
    own: int = trained.data.size
    if trained.process is None:
        factor = own // trained.model.prior.side
        sizes: list[Any] = [int(own * times) for times in PRIOR_SIDES if not own * times % factor]
    else:
        sizes = [own, *(list(shape) for shape in buckets_of(trained) if shape != (own, own))]
    samplers = SamplerConfig.__dataclass_fields__["name"].metadata["choices"] if "steps" in settings else ()
    return Form(conditioner.reads, list(getattr(conditioner, "names", [])), settings, list(samplers), sizes)
