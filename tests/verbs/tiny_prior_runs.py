"""Runs of VQ first stages and of priors over their codes, as training leaves them."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mmlab.stage.assembly import restore
from mmlab.training.artifacts import describe_frozen, save_parts
from tests.evaluate.tiny_scores import CLASSES, make_run
from tests.model.tiny_priors import louder

VQ = "{block_out_channels: [8, 8, 16], layers_per_block: 1, norm_num_groups: 4}"
FIRST = ["model/first_stage=vq_tiny", f"model.first_stage.architecture={VQ}", "model.first_stage.quantizer.codes=16"]


def vq_run(root: Path, name: str = "vq", seed: int = 0) -> Path:
    """A run of stage=autoencoder on pictures of 16 px: 4 x 4 codes of a book of 16."""
    overrides = ["model=autoencoder", "model/discriminator=patch_tiny", "data=emoji", "stage=autoencoder"]
    folder = make_run(root, name, [*overrides, *FIRST, "data.size=16", "stage.adversarial_weight=0"], ["first_stage"])
    if seed:
        model, _ = restore(folder)
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in model.first_stage.parameters():
                weight.add_(0.3 * torch.randn_like(weight))
        save_parts(model, ["first_stage"], folder / "artifacts", {"run": name}, {})
    return folder


def prior_run(root: Path, name: str, conditioner: Sequence[str] = CLASSES, *more: str) -> Path:
    """A run of stage=code_prior on the codes of `vq_run`, told one of three classes unless it is told otherwise."""
    learns = ["prior"] if "model/conditioner=none" in conditioner else ["prior", "conditioner"]
    overrides = ["model=code_prior", "data=emoji", "stage=code_prior", "sampler=codes", "data.size=16", *FIRST]
    small = ["model.prior={side: 4, depth: 2, width: 32, heads: 2}", f"stage.trainable=[{', '.join(learns)}]"]
    folder = make_run(root, name, [*overrides, *conditioner, *small, "stage.init_from=[vq]", *more], learns)
    model, _ = restore(folder)
    torch.manual_seed(1)
    save_parts(louder(model), learns, folder / "artifacts", {"run": name}, describe_frozen(model, learns))
    return folder
