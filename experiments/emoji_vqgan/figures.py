"""Print the figures of one run of run.sh as one JSON object: figures.py OUT SECONDS."""

import json
import sys
from pathlib import Path

out, seconds = Path(sys.argv[1]), int(sys.argv[2])
vqgan, kl, prior = (
    json.loads((out / "eval" / name / "scores.json").read_text()) for name in ("vqgan", "first_stage", "prior")
)
figures = {
    "code_use": vqgan["code_use"],
    "perplexity": vqgan["perplexity"],
    "psnr": vqgan["psnr"],
    "ssim": vqgan["ssim"],
    "rfid": vqgan["rfid"],
    "psnr_kl": kl["psnr"],
    "rfid_kl": kl["rfid"],
    "fid_samples": prior["fid"],
    "fid_noise": prior["noise_fid"],
    "fid_train": prior["train_fid"],
    "kid_samples": prior["kid"],
    "fid_all_codes": prior["all_codes_fid"],
    "fid_accepted": prior["accepted_fid"],
    "close_to_train": prior["neighbours"]["close"],
    **json.loads((out / "speed.json").read_text()),
}
# The denoiser's FID, if OUT is the output folder of emoji_ldm.
if (out / "eval" / "class" / "scores.json").is_file():
    figures["fid_samples_ldm"] = json.loads((out / "eval" / "class" / "scores.json").read_text())["fid"]
network = {name: vqgan["features"][name] for name in ("network", "hash", "stand_in")}
rounded = {name: round(value, 4) for name, value in {**figures, "minutes": seconds / 60}.items()}
print(json.dumps({**rounded, "feature_network": network}))
