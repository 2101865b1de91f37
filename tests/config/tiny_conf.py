"""A config folder for tests: the shipped roots, trainers and loggers with its own models, data and stages."""

import shutil
from pathlib import Path

from mmlab.config.compose import conf_dir

FILES = {
    "model/llava": """
defaults:
  - /schema/VisionLanguageModelConfig@_here_
  - vision: tiny
  - connector: mlp
  - language: tiny
  - _self_
""",
    "model/dual": """
defaults:
  - /schema/DualEncoderConfig@_here_
  - vision: tiny
  - _self_
""",
    "model/vision/tiny": """
defaults:
  - /schema/VisionEncoderConfig@_here_
  - _self_
init: random
architecture: {model_type: clip_vision_model, hidden_size: 16}
""",
    "model/language/tiny": """
defaults:
  - /schema/LanguageModelConfig@_here_
  - _self_
init: random
architecture: {model_type: llama}
tokenizer: someone/tokenizer
""",
    "model/connector/mlp": "defaults: [/schema/MLPConnectorConfig@_here_, _self_]\ndepth: 3\n",
    "model/connector/linear": "defaults: [/schema/LinearConnectorConfig@_here_]\n",
    "stage/align": "defaults: [/schema/ProjectorAlignmentConfig@_here_, _self_]\ntrainable: [connector]\n",
    "stage/open": "defaults: [/schema/ProjectorAlignmentConfig@_here_]\n",
    "data/shapes": """
defaults:
  - /schema/ImageTextDataConfig@_here_
  - _self_
root: shapes
train: [{path: train}]
val: [{path: val}]
global_batch: 8
micro_batch: 4
""",
    "experiment/llava/align_tiny": """
# @package _global_
defaults:
  - override /model: llava
  - override /data: shapes
  - override /stage: align
optim: {lr: 2e-3}
trainer: {max_steps: 4}
""",
}


def write_conf(folder: Path) -> Path:
    """Write the config files into `folder` and return it."""
    shipped = conf_dir()
    for part in ("optim", "trainer", "logger", "callbacks", "debug", "hydra"):
        shutil.copytree(shipped / part, folder / part)
    for root in ("train", "eval", "chat", "plan"):
        shutil.copy(shipped / f"{root}.yaml", folder)
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text(text.lstrip())
    return folder
