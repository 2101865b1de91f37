"""Write real shards, as img2dataset would: tars.py OUT."""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SHARDS, SAMPLES = 4, 2000

out = Path(sys.argv[1])
out.mkdir()
random = np.random.default_rng(0)
pictures = []
for _ in range(100):
    file = io.BytesIO()
    pixels = random.integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    pictures.append(file.getvalue())
for shard in range(SHARDS):
    with tarfile.open(out / f"{shard:05d}.tar", "w") as tar:
        for j in range(SAMPLES):
            key = f"{shard:05d}{j:04d}"
            url = f"https://example.org/{key}.jpg"
            record = {"caption": f"noise {j} of shard {shard}", "url": url, "key": key, "status": "success"}
            record |= {"error_message": None, "width": 256, "height": 256, "sha256": f"{j:064x}"}
            for name, data in (("jpg", pictures[j % 100]), ("json", json.dumps(record).encode())):
                member = tarfile.TarInfo(f"{key}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
