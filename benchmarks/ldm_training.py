"""Contest: latent diffusion in the shape of Stable Diffusion, from the start of the process to the saved denoiser.

Encoding a picture takes 0.5 times the FLOPs that training the denoiser on it takes, as in Stable Diffusion at 256 px
(0.50; 0.46 at 512 px; 0.57 for latent diffusion's LDM-4 of faces, 0.38 for DiT-XL/2). See `ldm_runs` for what is
compared.

    python benchmarks/ldm_training.py [ROUNDS]
"""

from functools import partial
from typing import Any

import ldm_runs
from contest import Contest, main

UNET = {
    "block_out_channels": [112, 224, 336],
    "layers_per_block": 2,
    "attention_head_dim": 28,
    "norm_num_groups": 16,
}


def contest(title: str, unet: dict[str, Any]) -> Contest:
    training = ldm_runs.Training([32, 64, 128, 128], unet)
    return Contest(
        title,
        "samples",
        {
            "diffusers' script": partial(ldm_runs.train_theirs, training=training),
            "mmlab train": partial(ldm_runs.train_ours, training=training),
            "mmlab, cached latents": partial(ldm_runs.train_ours_cached, training=training),
        },
        partial(ldm_runs.prepare, training=training),
        goals={"mmlab train": 1.1, "mmlab, cached latents": 3},
    )


CONTEST = contest("LDM, UNet as in SD", UNET)

if __name__ == "__main__":
    main(CONTEST)
