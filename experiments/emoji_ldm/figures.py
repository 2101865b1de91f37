"""Print the figures of one run of run.sh as one JSON object: figures.py EVAL_FOLDER SECONDS."""

import json
import sys
from pathlib import Path

folder, seconds = Path(sys.argv[1]), int(sys.argv[2])
first_stage, by_class, by_text = (
    json.loads((folder / name / "scores.json").read_text()) for name in ("first_stage", "class", "text")
)
figures = {
    "psnr": first_stage["psnr"],
    "pca_psnr": first_stage["linear_psnr"],
    "values": first_stage["linear_values"],
    "ssim": first_stage["ssim"],
    "rfid": first_stage["rfid"],
    "fid_samples": by_class["fid"],
    "fid_samples_text": by_text["fid"],
    "fid_train": by_class["train_fid"],
    "fid_noise": by_class["noise_fid"],
    "kid_samples": by_class["kid"],
    "kid_samples_text": by_text["kid"],
    "close_to_train": by_class["neighbours"]["close"],
    "minutes": seconds / 60,
}
network = {name: first_stage["features"][name] for name in ("network", "hash", "stand_in")}
print(json.dumps({**{name: round(value, 4) for name, value in figures.items()}, "feature_network": network}))
