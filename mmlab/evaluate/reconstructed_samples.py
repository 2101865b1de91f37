"""What a first stage makes of a few validation pictures while it is trained."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from mmlab.config.errors import DataError
from mmlab.data.module import ShardDataModule
from mmlab.evaluate.questions import read_picture
from mmlab.evaluate.reconstructions import reconstruct
from mmlab.evaluate.samples import Card, Samples, spread
from mmlab.model.adversarial_autoencoder import AutoencoderModel
from mmlab.model.fidelity import psnr
from mmlab.model.first_stage import to_signed


class ReconstructedSamples(Samples):
    """Validation pictures, each with its reconstruction on the right and their PSNR below.

    Args:
        count: see `Samples`.
        sheets: see `Samples`.
    """

    def __init__(self, count: int = 8, sheets: int = 20):
        super().__init__(count, sheets)
        self._fixed: list[tuple[str, Tensor]] | None = None

    def show(self, trainer: L.Trainer, module: Any) -> list[Card]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(module.model, AutoencoderModel) or not isinstance(data, ShardDataModule):
            return []
        if self._fixed is None:
            self._fixed = self._choose(data)
        if not self._fixed:
            return []
        keys, pictures = zip(*self._fixed, strict=True)
        originals = torch.stack(pictures)
        back = reconstruct(module.model.first_stage, originals)
        decibels = psnr(to_signed(originals), to_signed(back)).tolist()
        pairs = torch.cat([originals, back], -1)
        return [_card(*card) for card in zip(pairs, keys, decibels, strict=True)]

    def _choose(self, data: ShardDataModule) -> list[tuple[str, Tensor]]:
        """Keys and pictures, as training decodes them."""
        chosen: list[tuple[str, Tensor]] = []
        spec = data.collate.image
        for index, i in spread(data, self.count) if spec is not None else []:
            try:
                picture = read_picture(index, i, spec)  # type: ignore[arg-type]
            except DataError:
                continue  # validation counts and reports it
            if picture is not None:
                chosen.append((str(index.keys[i]), picture))
        return chosen


def _card(pair: Tensor, key: str, decibels: float) -> Card:
    return Card(pair, {"key": key, "psnr": f"{decibels:.2f}"}, f"{decibels:.1f} dB")
