"""Networks whose features are used to compare images. Legend: N images, H/W pixels, P patches, F width of a feature.

A distance is meaningless without its network, its weights and its input format: `describe` gives all three and is part
of every result.
"""

import hashlib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from mmlab.config.build import build
from mmlab.config.errors import ConfigError
from mmlab.config.folders import conf_dir
from mmlab.evaluate.config import SampleQualityConfig
from mmlab.evaluate.pictures.fid import FeatureSet
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.model.config import VisionEncoderConfig
from mmlab.model.preprocessing import pixels_of, read_preprocessor, resized
from mmlab.model.pretrained import reason
from mmlab.model.vision import VisionEncoder
from mmlab.model.vision_layout import inputs_of
from mmlab.runs.references import locate_files
from mmlab.runs.run import find_run, load_run_config
from mmlab.training.filling import fill_parts
from mmlab.weights import content_hash

INCEPTION = "inception"
CONFIG = "config.json"
"""The file that every model of transformers has."""
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""The weights of the Inception network of the published FID numbers, as torch-fidelity names them."""
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"


class FeatureNetwork(Protocol):
    """Computes features of images."""

    def __call__(self, pixels_N3HW: Tensor) -> Tensor:
        """uint8 `[N, 3, H, W]` → features, float32 `[N, F]`."""
        ...

    def to(self, device: torch.device) -> "FeatureNetwork":
        """Move the network, and return it."""
        ...

    def describe(self) -> dict[str, Any]:
        """`network`, `hash` of its weights, `width` F, `input` (size, resize filter, range), `stand_in`."""
        ...


def feature_network(name: str, root: str | Path = "runs") -> FeatureNetwork:
    """`inception`, the vision encoder of a run, or a pretrained one of transformers.

    Args:
        name: `inception`, name or folder of a run, or a model's folder or name on the hub.
        root: folder of the runs.

    Raises:
        ConfigError: no such run or model, one without a vision encoder, or Inception is not installed.
    """
    if name == INCEPTION:
        return Inception()
    if Path(name).expanduser().joinpath(CONFIG).is_file():
        return PretrainedFeatures(name)
    try:
        folder = find_run(name, root)
    except ConfigError as error:
        # A recipe's name looks like one on the hub.
        if name.count("/") != 1 or Path(name).exists() or (conf_dir() / "experiment" / f"{name}.yaml").is_file():
            raise
        try:
            cached_file(name, CONFIG)
        except OSError as miss:
            raise ConfigError(f"{error} Nor can a model of this name be read from the hub: {reason(miss)}") from None
        return PretrainedFeatures(name)
    return RunFeatures(folder)


def feature_networks(names: Any, root: str | Path = "runs") -> list[FeatureNetwork]:
    """The networks of a setting: None, a name, or a list of names; see `feature_network`.

    Raises:
        ConfigError: as `feature_network`, or anything else in the setting.
    """
    if names is None:
        return []
    several = names if isinstance(names, Sequence) and not isinstance(names, str) else [names]
    names_only = all(isinstance(name, str) and name for name in several)
    if not several or not names_only or len(set(several)) < len(several):
        raise ConfigError(f"features={names} must be the name of a network, or a list of different ones.")
    return [feature_network(name, root) for name in several]


def features_of(
    pictures: PictureSet, network: FeatureNetwork, batch_size: int = SampleQualityConfig.batch_size
) -> FeatureSet:
    """The features of real images."""
    features = FeatureSet()
    for batch in pictures.batches(batch_size, f"reading {pictures.index.root.name}"):
        features.add(network(batch))
    return features


class RunFeatures:
    """The vision encoder of a contrastive run, averaged over patches: a substitute for Inception.

    Its distances compare runs of one project; they cannot be compared with published FIDs.

    Args:
        folder: folder of the run.

    Raises:
        ConfigError: the run has no vision encoder.
    """

    vision: Any  # an ImageEncoder

    def __init__(self, folder: Path):
        cfg = load_run_config(folder)
        if cfg.model.get("vision") is None:
            raise ConfigError(
                f"{folder} has no vision encoder; set features to a run of stage=contrastive, to a pretrained vision "
                "encoder, or to inception."
            )
        locate_files(cfg, folder)
        holder = nn.ModuleDict({"vision": build(cfg.model.vision)})
        fill_parts(holder, [folder])
        self.name = folder.name
        self.vision = holder["vision"].eval().requires_grad_(False)  # type: ignore[assignment]

    @torch.no_grad()
    def __call__(self, pixels_N3HW: Tensor) -> Tensor:
        device = next(self.vision.parameters()).device
        return self.vision(resized(pixels_N3HW.to(device), self.vision.image_size)).mean(1).float()

    def to(self, device: torch.device) -> "RunFeatures":
        self.vision.to(device)
        return self

    def describe(self) -> dict[str, Any]:
        return {
            "network": f"vision encoder of the run {self.name}, mean over its patches",
            "hash": content_hash(self.vision),
            "width": self.vision.width,
            "input": f"{self.vision.image_size} px, bicubic with antialiasing, uint8",
            "stand_in": True,
        }


class PretrainedFeatures:
    """A pretrained vision encoder of transformers, such as CLIP's or DINOv2's.

    Its feature of an image is what its own head pools (`pooler_output`: the normed class token of CLIP and DINOv2,
    SigLIP's attention pooling, the mean of a ConvNet's last map), or else the mean over the patches.

    Args:
        source: name on the hub, or folder.

    Raises:
        ConfigError: it cannot be read, or does not encode images.
    """

    def __init__(self, source: str):
        self.source = source
        size = pixels_of(read_preprocessor(source))
        try:
            # With its last layer, an encoder has its whole tower.
            self.vision = VisionEncoder(VisionEncoderConfig(source=source, image_size=size, feature_layer=-1))
            self.vision.load_pretrained()
        except ConfigError as error:
            raise ConfigError(f"features={source}: {str(error).removeprefix('model.vision: ')}") from error
        self.vision.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, pixels_N3HW: Tensor) -> Tensor:
        device = next(self.vision.parameters()).device
        pixels = self.vision.normalize(resized(pixels_N3HW.to(device), self.vision.image_size))
        result = self.vision.tower(**inputs_of(self.vision.tower, pixels))
        pooled = getattr(result, "pooler_output", None)
        if pooled is None:
            hidden = result.last_hidden_state
            pooled = hidden[:, self.vision.prefix :].mean(1) if hidden.dim() == 3 else hidden.mean((2, 3))
        return pooled.flatten(1).float()

    def to(self, device: torch.device) -> "PretrainedFeatures":
        self.vision.to(device)
        return self

    def describe(self) -> dict[str, Any]:
        size = self.vision.image_size
        return {
            "network": f"{self.vision.config.model_type} of {self.source}, as its head pools it",
            "hash": content_hash(self.vision.tower),
            "width": self(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[1],
            "input": f"{size} px, bicubic with antialiasing, uint8",
            "stand_in": True,
        }


class Inception:
    """The Inception network of published FIDs and KIDs, 2,048 features, from the package torch-fidelity.

    Raises:
        ConfigError: the package or its weights are not installed.
    """

    def __init__(self) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # type: ignore
        except ImportError as error:
            raise ConfigError(
                f"features=inception needs the package torch-fidelity ({error}); install it, or name a contrastive "
                "run, whose distances cannot be compared with published FIDs."
            ) from error
        path = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
        if not path.is_file():
            raise ConfigError(f"features=inception needs the weights {path}; download them from {URL}.")
        _refuse_code(path)
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
        self.device = torch.device("cpu")
        self.hash = hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    @torch.no_grad()
    def __call__(self, pixels_N3HW: Tensor) -> Tensor:
        (features,) = self.network(pixels_N3HW.to(self.device))
        return features.float()

    def to(self, device: torch.device) -> "Inception":
        self.device = device
        self.network.to(device)
        return self

    def describe(self) -> dict[str, Any]:
        return {
            "network": "Inception v3 of the published FID (torch-fidelity's inception-v3-compat, layer 2048)",
            "hash": self.hash,
            "width": 2048,
            "input": "299 px, TensorFlow 1's bilinear without antialiasing, uint8",
            "stand_in": False,
        }


def _refuse_code(path: Path) -> None:
    """Refuse a file with more than tensors: the package would run any code that is pickled in it."""
    try:
        torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(f"{path} does not hold plain tensors; download it again from {URL}.") from error
