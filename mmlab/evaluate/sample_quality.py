"""How near a generative model's pictures are to real ones, as a metric of the run itself: what sweeps compare."""

from typing import Any

import lightning as L

from mmlab.config.errors import ConfigError
from mmlab.data.sample import ImageSpec
from mmlab.evaluate.drawn_samples import draw_samples, features_of
from mmlab.evaluate.feature_networks import FeatureNetwork, feature_network
from mmlab.evaluate.generation import BorrowedConditions
from mmlab.evaluate.image_quality import compare
from mmlab.evaluate.last_validation import refuse_no_last_validation
from mmlab.evaluate.picture_set import PictureSet
from mmlab.evaluate.stage_generator import stage_generator


class SampleQuality(L.Callback):
    """Logs `val/fid` and `val/kid` in the last validation of a run, of its sampler and, under `EMA`, of the average.

    The n-th sample has the seed n, and conditions are those of the pictures, as in `mmlab eval`, which gives the same
    numbers later. Every rank draws the same samples, so none waits for another in vain.

    Args:
        features: network whose features are compared: a run of stage=contrastive, or `inception`.
        pictures: folder of shards to compare with.
        aspect: how their pictures become square.
        samples: how many are drawn.
        batch_size: how many at a time.
        root: where runs lie.

    Raises:
        ConfigError: no such run, a stage that does not generate, fewer than two samples, or no validation at the end.
        DataError: no such shards, or latents in place of pictures.
    """

    def __init__(
        self,
        features: str,
        pictures: str,
        aspect: str = "stretch",
        samples: int = 1000,
        batch_size: int = 64,
        root: str = "runs",
    ):
        self.features = features
        self.pictures = pictures
        self.aspect = aspect
        self.samples = samples
        self.batch_size = batch_size
        self.root = root
        self._opened: tuple[FeatureNetwork, PictureSet, BorrowedConditions] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Opened before the first step: a wrong name should not cost a run.
        generator = stage_generator(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        if generator is None:
            raise ConfigError(
                "callbacks.sample_quality draws samples; it goes with stage=latent_diffusion and code_prior."
            )
        if self.samples < 2:
            raise ConfigError(f"callbacks.sample_quality.samples={self.samples}: a distance needs two samples or more.")
        refuse_no_last_validation(trainer, "sample_quality")
        spec = ImageSpec(generator.size, self.aspect)
        pictures = PictureSet(self.pictures, spec)
        network = feature_network(self.features, self.root).to(trainer.strategy.root_device)
        network(pictures.picture(0)[None])
        self._opened = network, pictures, BorrowedConditions(generator.model, pictures, self.samples)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._opened is None or trainer.global_step < trainer.max_steps:
            return
        network, pictures, conditions = self._opened
        generator = stage_generator(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        assert generator is not None
        drawn = draw_samples(generator, conditions, network, self.samples, self.batch_size)
        distances = compare(drawn.features, features_of(pictures, network, self.batch_size))
        pl_module.log_dict({"val/fid": distances["fid"], "val/kid": distances["kid"]}, rank_zero_only=False)
