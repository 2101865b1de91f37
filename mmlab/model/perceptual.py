"""Perceptual distances between images. Legend: B images, H/W pixels; pixels are in [-1, 1]."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from mmlab.config.errors import ConfigError
from mmlab.model.config import LPIPSConfig
from mmlab.weights import fill

FILE = "lpips_vgg16.safetensors"
"""The file's name in a folder, or in a repository of the hub."""
# Channels of VGG16's convolutions, up to each layer that is read (Simonyan and Zisserman, table 1, D).
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# ImageNet's mean and deviation, for pixels in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018, equation 1; `lin` on VGG16, version 0.1).

    The weights are one safetensors file: VGG16's convolutions as `features.<i>.weight` and `.bias` (i = 0, 2, 5, …, 28
    as in torchvision) and five linear heads as `lin<k>.weight` `[1, C, 1, 1]`. The lpips package's own names
    (`net.slice<n>.<i>.…`, `lin<k>.model.1.weight`) are accepted too, so this writes the file:
    `save_file({k: v for k, v in lpips.LPIPS(net="vgg").state_dict().items() if "lins" not in k}, "…")`.

    Args:
        config: settings; `source` is the file, a folder with it as `lpips_vgg16.safetensors`, or such a repository.
    """

    label = "LPIPS (VGG16, lin 0.1)"
    smallest = 16
    """Side in pixels of the smallest image that it takes: VGG16 halves it four times."""
    shift: Tensor
    scale: Tensor

    def __init__(self, config: LPIPSConfig):
        super().__init__()
        self.settings = config
        self.features = nn.Sequential(*_vgg16())
        for k, channels in enumerate(STAGES):
            self.add_module(f"lin{k}", nn.Conv2d(channels[-1], 1, 1, bias=False))
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)

    def load_pretrained(self) -> None:
        """Fill the weights from the source of the settings; raises ConfigError when they do not fit."""
        path = _find(self.settings.source)
        fill(self, _read(path), path)

    def forward(self, x_B3HW: Tensor, y_B3HW: Tensor) -> Tensor:
        """Return float32 distances `[B]` of pixels in [-1, 1]; H and W are at least `smallest`."""
        dtype = self.features.get_parameter("0.weight").dtype
        # One after the other: images need no gradients, and their reconstructions do.
        x, y = (((images - self.shift) / self.scale).to(dtype) for images in (x_B3HW, y_B3HW))
        distance = torch.zeros(len(x_B3HW), device=x_B3HW.device)
        for k, stage in enumerate(self._stages()):
            x, y = stage(x), stage(y)
            difference = F.normalize(x.float(), dim=1, eps=1e-10) - F.normalize(y.float(), dim=1, eps=1e-10)
            weight = self.get_parameter(f"lin{k}.weight").float()
            distance = distance + (difference.square() * weight.view(-1, 1, 1)).sum(1).mean((1, 2))
        return distance

    def _stages(self) -> list[nn.Sequential]:
        """Return VGG16, cut before each max-pooling, after the ReLUs whose features are read."""
        layers = list(self.features)
        pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        cuts = zip([0, *pools], [*pools, len(layers)], strict=True)
        return [nn.Sequential(*layers[start:stop]) for start, stop in cuts]


class StandIn(nn.Module):
    """A distance that needs no download and is not LPIPS: small untrained convolutions, at three scales.

    It is the difference of features relative to their strength at each position, as LPIPS with trained features: a
    lost edge counts more than a shift of brightness. Its values are comparable only with each other.
    """

    label = "stand-in (untrained convolutions; its numbers are not LPIPS)"
    smallest = 8
    """Side in pixels of the smallest image that both convolutions fit into."""
    SCALES = 3
    FLOOR = 0.05
    """Strength of features below which a difference counts less, so that noise on a plain background is ignored."""

    first: Tensor
    second: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Fixed and not in checkpoints: always drawn from the same seed, on the CPU.
        generator = torch.Generator().manual_seed(0)
        first = torch.randn(32, 3, 3, 3, generator=generator, device="cpu")
        second = torch.randn(64, 32, 3, 3, generator=generator, device="cpu")
        # Each filter sums to 0, so that it responds to changes, not to brightness.
        first = first - first.mean((1, 2, 3), keepdim=True)
        self.register_buffer("first", first / (3 * 9) ** 0.5, persistent=False)
        self.register_buffer("second", second * (2 / (32 * 9)) ** 0.5, persistent=False)

    def forward(self, x_B3HW: Tensor, y_B3HW: Tensor) -> Tensor:
        """Return float32 distances `[B]` of pixels in [-1, 1], in 0 … about 1; H and W are at least `smallest`."""
        both = torch.cat([x_B3HW, y_B3HW]).to(self.first.dtype)
        distances = []
        for scale in range(self.SCALES):
            if scale:
                both = F.avg_pool2d(both, 2)
            if min(both.shape[-2:]) < 3:
                break
            # Not ReLU: its gradient is 0 where an image is flat, which would stay flat.
            edges = F.gelu(F.conv2d(both, self.first))
            distances.append(self._relative(edges))
            if min(edges.shape[-2:]) >= 6:
                distances.append(self._relative(F.gelu(F.conv2d(F.avg_pool2d(edges, 2), self.second))))
        return torch.stack(distances).mean(0)

    def _relative(self, both: Tensor) -> Tensor:
        """Return squared difference over squared strength, averaged over positions."""
        x, y = both.float().chunk(2)
        strength = x.square().mean(1) + y.square().mean(1)
        return ((x - y).square().mean(1) / (strength + self.FLOOR**2)).mean((1, 2))


def _vgg16() -> list[nn.Module]:
    layers: list[nn.Module] = []
    below = 3
    for stage in STAGES:
        if layers:
            layers.append(nn.MaxPool2d(2))
        for channels in stage:
            layers += [nn.Conv2d(below, channels, 3, padding=1), nn.ReLU()]
            below = channels
    return layers


def _find(source: str | None) -> Path:
    """Return the file of the weights; it is downloaded where `source` is a repository of the hub."""
    otherwise = "model/perceptual=stand_in needs none"
    if source is None:
        raise ConfigError(
            f"model.perceptual.source is not set: LPIPS needs its weights, a file such as {FILE}; {otherwise}."
        )
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / FILE
    if path.is_file():
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(source, FILE))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model.perceptual.source={source} is neither a file nor a repository with {FILE} ({reason}); {otherwise}."
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    """Return the file's tensors under our names."""
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} is not a safetensors file: {error}.") from error
    weights = {}
    for name, tensor in stored.items():
        if name.startswith(("lins.", "scaling_layer.")):  # the lpips package has the heads twice
            continue
        name = re.sub(r"^net\.slice\d\.", "features.", name)
        weights[name.replace(".model.1.", ".")] = tensor
    return weights
