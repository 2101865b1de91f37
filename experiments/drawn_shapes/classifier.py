"""A classifier of shape and color, trained on real scenes. Legend: N pictures, S side in pixels."""

import numpy as np
import torch
from likeness import Scenes
from torch import Tensor, nn
from torch.nn import functional as F

from mmlab.data.sources.scenes import COLORS, KINDS


class Classifier(nn.Module):
    """Three convolutions; the strongest response of each feature anywhere decides shape and color."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for below, width in ((3, 24), (24, 48), (48, 96)):
            layers += [nn.Conv2d(below, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers[:-1])
        self.kind, self.color = nn.Linear(96, len(KINDS)), nn.Linear(96, len(COLORS))

    def forward(self, pixels_N3SS: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of shape and color for pixels in [0, 1]."""
        features = self.features(4 * (pixels_N3SS - 0.8)).amax((2, 3))
        return self.kind(features), self.color(features)


def train(scenes: Scenes, steps: int = 600, batch: int = 48) -> Classifier:
    """Train on scenes with AdamW and a one-cycle learning rate; the same network for the same scenes."""
    torch.manual_seed(0)
    network, pixels = Classifier(), as_tensor(scenes.pixels)
    kinds, colors = torch.from_numpy(scenes.kinds), torch.from_numpy(scenes.colors)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    for _ in range(steps):
        rows = torch.randint(len(pixels), (batch,))
        kind, color = network(pixels[rows])
        loss = F.cross_entropy(kind, kinds[rows]) + F.cross_entropy(color, colors[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def classify(network: Classifier, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of shape and color in `KINDS` and `COLORS`, for pixels in [0, 1]."""
    parts = [network(part) for part in as_tensor(pixels).split(256)]
    kinds, colors = (torch.cat(one).argmax(1).numpy() for one in zip(*parts, strict=True))
    return kinds, colors


def as_tensor(pixels: np.ndarray) -> Tensor:
    """`[N, 3, S, S]` of `[N, S, S, 3]`."""
    return torch.from_numpy(np.ascontiguousarray(pixels, np.float32)).permute(0, 3, 1, 2)
