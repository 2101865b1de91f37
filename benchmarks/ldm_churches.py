"""Contest: latent diffusion in the shape of LDM-8 for churches, from the start of the process to the saved denoiser.

Encoding a picture takes 2.2 times the FLOPs that training the denoiser on it takes, as in LDM-8 at 256 px (2.17; 2.0
for DiT-B/2). See `ldm_runs` for what is compared.

    python benchmarks/ldm_churches.py [ROUNDS]
"""

from contest import main
from ldm_training import contest

UNET = {
    "block_out_channels": [48, 96, 96, 192, 192],
    "layers_per_block": 2,
    "down_block_types": ["AttnDownBlock2D"] * 4 + ["DownBlock2D"],
    "up_block_types": ["ResnetUpsampleBlock2D"] + ["AttnUpBlock2D"] * 4,
    "attention_head_dim": 24,
    "norm_num_groups": 16,
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}

CONTEST = contest("LDM, UNet of LDM-8", UNET)

if __name__ == "__main__":
    main(CONTEST)
