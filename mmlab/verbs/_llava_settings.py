"""The config of a converted checkpoint of LLaVA."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig

from mmlab.config.compose import compose
from mmlab.config.errors import ConfigError
from mmlab.config.folders import conf_dir
from mmlab.data.config import ANYRES
from mmlab.model.config import LanguageModelConfig
from mmlab.model.llava_checkpoint import LlavaCheckpoint
from mmlab.model.pretrained import NO_CODE, refuse_code
from mmlab.runs.check import looks_local


@dataclass(frozen=True)
class Choices:
    """What the command line adds to a checkpoint.

    Attributes:
        base: folder or hub name of the language model, where the checkpoint does not hold it.
        vision: folder or hub name of the vision tower, in place of the one that the checkpoint names.
        template: of the prompt; None: what the checkpoint's chat template writes, or LLaVA's own.
        aspect: how images become square; None: as the checkpoint says.
    """

    base: str | None = None
    vision: str | None = None
    template: str | None = None
    aspect: str | None = None


def settings_of(checkpoint: LlavaCheckpoint, choices: Choices, out: Path) -> DictConfig:
    """Return the run's config, apart from the prompt and what follows from the parts that are written.

    Raises:
        ConfigError: a vision tower that is not here, or a projector of no known recipe.
    """
    cfg: Any = _minigpt4(checkpoint) if checkpoint.layout == "MiniGPT-4's" else _llava(checkpoint, choices)
    cfg.run.name, cfg.run.root = out.name, str(out.parent)
    cfg.data.train, cfg.data.val = [], []
    return cfg


def _llava(checkpoint: LlavaCheckpoint, choices: Choices) -> Any:
    stage = "align" if checkpoint.kind == "connector" else "finetune"
    connector = "linear" if "proj.weight" in checkpoint.weights["connector"] else "mlp2x_gelu"
    page = _page(choices.vision or checkpoint.vision_source)
    parts = [f"model/vision={page}", f"model/connector={connector}"]
    model = "llava_next" if checkpoint.weights.get("newline") else "llava"
    tiled = choices.aspect is None and checkpoint.weights.get("newline")
    data = "llava_next_779k" if tiled else "llava_mix_665k"  # a picture in tiles needs longer rows
    cfg: Any = compose("train", [f"model={model}", *parts, f"data={data}", f"stage={stage}"])
    vision = cfg.model.vision
    if page == "pretrained" or reachable(choices.vision or checkpoint.vision_source):
        vision.source = _tower(checkpoint, choices)
    vision.feature_layer = checkpoint.feature_layer
    vision.features = "patch" if checkpoint.features == "all" else checkpoint.features
    for key, value in checkpoint.normalization.items():
        vision[key] = value
    if choices.base is not None and not reachable(choices.base):
        raise ConfigError(f"There is no folder {choices.base}; give the language model's folder or hub name as --base.")
    base = choices.base or (checkpoint.base if reachable(checkpoint.base) else None)
    cfg.model.language = OmegaConf.structured(LanguageModelConfig(source=base))
    cfg.data.aspect = ANYRES if tiled else choices.aspect or checkpoint.aspect or "pad"
    if tiled:
        cfg.data.grids = _grids(checkpoint, _side(checkpoint, vision))
        trained = ["vision"] if checkpoint.weights.get("vision") else []
        cfg.stage.trainable = [*trained, "connector", "newline", "language"]
    return cfg


def _side(checkpoint: LlavaCheckpoint, vision: Any) -> int:
    """The side of the squares that the vision tower reads, in pixels."""
    if checkpoint.vision is not None:
        return checkpoint.vision.image_size
    if is_folder(vision.source):
        refuse_code(vision.source)
        config = AutoConfig.from_pretrained(Path(vision.source).expanduser(), **NO_CODE)
        return getattr(config, "vision_config", config).image_size
    side = (vision.architecture or {}).get("image_size")
    if side is None:
        raise ConfigError(
            f"{checkpoint.path} sees pictures as tiles of the vision tower {vision.source}, whose config is not here; "
            "give a folder with its config.json as --vision."
        )
    return side


def _grids(checkpoint: LlavaCheckpoint, side: int) -> list[list[int]]:
    """Rows and columns of tiles in each grid of a checkpoint."""
    wrong = next((pair for pair in checkpoint.pinpoints if any(pixels % side or not pixels for pixels in pair)), None)
    if wrong is not None or not checkpoint.pinpoints:
        has = "no grids of tiles" if wrong is None else f"a grid of {wrong[0]} x {wrong[1]} pixels"
        raise ConfigError(f"{checkpoint.path} has {has}; grids of whole tiles of {side} pixels can be converted.")
    return [[height // side, width // side] for height, width in checkpoint.pinpoints]


def _minigpt4(checkpoint: LlavaCheckpoint) -> Any:
    """The config of the recipe that trains such a projector."""
    width, features = checkpoint.weights["connector"]["proj.weight"].shape
    sizes = {4096: "vicuna_7b_stage2", 5120: "vicuna_13b_stage2"}
    if features != 768 or width not in sizes:
        raise ConfigError(
            f"{checkpoint.path} projects {features} values to {width}; of MiniGPT-4, projectors from its Q-Former "
            "(768) to Vicuna 7B (4096) and 13B (5120) can be converted."
        )
    cfg: Any = compose("train", [f"experiment=minigpt4/{sizes[width]}"])
    cfg.stage.init_from = []
    return cfg


def _page(source: str | None) -> str:
    """The option of conf/model/vision with a tower of that name; `pretrained` is any other one."""
    for page in sorted((conf_dir() / "model" / "vision").glob("*.yaml")):
        named: Any = OmegaConf.load(page)
        if source is not None and Path(named.get("source") or "").name == Path(source).name:
            return page.stem
    return "pretrained"


def _tower(checkpoint: LlavaCheckpoint, choices: Choices) -> str | None:
    """Where the vision tower is; None if only the checkpoint has it."""
    source = choices.vision or checkpoint.vision_source
    if source is None or reachable(source):
        return source
    raise ConfigError(
        f"{checkpoint.path} sees with the vision tower {source}, which is not here; give its folder or hub name as "
        "--vision."
    )


def reachable(source: str | None) -> bool:
    """Whether a source is a folder that is here, or a name on the hub."""
    return is_folder(source) or (source is not None and "/" in source and not looks_local(source))


def is_folder(source: str | None) -> bool:
    """Whether a source is a folder that is here."""
    return source is not None and Path(source).expanduser().is_dir()
