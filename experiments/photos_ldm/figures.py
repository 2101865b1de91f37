"""Print the figures of one run of run.sh as one JSON object: figures.py EVAL_FOLDER SECONDS."""

import json
import sys
from pathlib import Path
from typing import Any

FOLDER, SECONDS = Path(sys.argv[1]), int(sys.argv[2])
SCORES = [f"{of}{name}" for of in ("", "train_") for name in ("fid", "kid", "precision", "recall")]
SCORES += ["fid_bias", "fid_reference_bias"]


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name / "scores.json").read_text())


def rounded(values: dict[str, Any]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


first_stage, samples = read("first_stage"), read("class")
steps = [json.loads(line) for line in Path("steps.jsonl").read_text().splitlines()]
figures: dict[str, Any] = rounded(
    {
        "psnr": first_stage["psnr"],
        "pca_psnr": first_stage["linear_psnr"],
        "values": first_stage["linear_values"],
        "ssim": first_stage["ssim"],
        "fid_noise": samples["noise_fid"],
        "close_to_train": samples["neighbours"]["close"],
        "minutes": SECONDS / 60,
    }
)
# The first network is EfficientNet-Lite0, the other one the stand-in.
for name, reconstructed, drawn in zip(
    ("efficientnet_lite0", "stand_in"),
    (first_stage, *first_stage["others"]),
    (samples, *samples["others"]),
    strict=True,
):
    figures[name] = rounded({"rfid": reconstructed["rfid"], **{score: drawn[score] for score in SCORES}})
    figures[name]["feature_network"] = {key: drawn["features"][key] for key in ("network", "hash", "width")}
figures["minutes_of_steps"] = {line["step"]: line["minutes"] for line in steps}
figures["cpu_minutes_of_steps"] = {line["step"]: line["cpu_minutes"] for line in steps}
print(json.dumps(figures))
