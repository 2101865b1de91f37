"""The `mmlab` command with EfficientNet-Lite0 among the models of transformers, for `features=FOLDER`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "real_parts"))

import efficientnet_lite  # noqa: F401  # registers it

from mmlab import cli

if __name__ == "__main__":
    sys.exit(cli.main())
