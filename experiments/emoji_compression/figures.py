"""Print the figures of one run of run.sh as one JSON object: figures.py OUT SECONDS."""

import json
import sys
from pathlib import Path

out, seconds = Path(sys.argv[1]), int(sys.argv[2])
FIRST_STAGES = {2: "first_stage-kl_f2_tiny", 4: "first_stage", 8: "first_stage-kl_f8_tiny"}

figures: dict[str, dict[str, float]] = {}
for factor in (1, 2, 4, 8):
    done = json.loads((out / "runs" / f"emoji-compression_f{factor}" / "done.json").read_text())
    row = {"steps": done["steps"], "fid": done["val/fid"], "kid": done["val/kid"]}
    if factor in FIRST_STAGES:
        scores = json.loads((out / "eval" / FIRST_STAGES[factor] / "scores.json").read_text())
        row |= {"values": scores["linear_values"], "psnr": scores["psnr"], "rfid": scores["rfid"]}
    figures[f"f{factor}"] = {name: round(value, 4) for name, value in row.items()}
print(json.dumps({**figures, "minutes": round(seconds / 60, 1)}))
