"""Check the encoder on photos of ImageNet's classes, and score a linear probe of its features: probe.py DATA.

Writes probe.json: `top1` of ImageNet's last layer on the training photos of classes that ImageNet has, and the share of
held-out photos whose coarse class a linear probe on the mean of the 49 positions names.
"""

import sys
from pathlib import Path

import efficientnet_lite
import groceries
import numpy as np
import prepare
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

IMAGENET = {
    "Granny-Smith": 948,
    "Orange": 950,
    "Lemon": 951,
    "Pineapple": 953,
    "Banana": 954,
    "Pomegranate": 957,
    "Cucumber": 943,
    "Zucchini": 939,
    "Green-Bell-Pepper": 945,
    "Red-Bell-Pepper": 945,
    "Yellow-Bell-Pepper": 945,
    "Cabbage": 936,
}
"""Fine class → class of ImageNet (its 1,000 classes in the usual order)."""


@torch.inference_mode()
def mean_features(model: efficientnet_lite.EfficientNetLite, files: list[Path]) -> Tensor:
    """The mean of the 49 positions of each photo `[N, 1280]`."""
    rows = []
    for start in range(0, len(files), 64):
        pictures = [Image.open(file).convert("RGB").resize((224, 224), 3) for file in files[start : start + 64]]
        pixels = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
        rows.append(model(efficientnet_lite.normalized(pixels)).pooler_output)
    return torch.cat(rows)


def top1(logits: Tensor, fine: list[str]) -> dict[str, list[int]]:
    """Right photos and photos of each class that ImageNet has."""
    best, table = logits.argmax(1).tolist(), {}
    for name, number in IMAGENET.items():
        of_class = [guess == number for guess, own in zip(best, fine, strict=True) if own == name]
        table[name] = [sum(of_class), len(of_class)]
    return table


def linear_probe(train: Tensor, train_y: list[str], val: Tensor, val_y: list[str], decay: float = 0.01) -> float:
    """Accuracy of logistic regression on standardized features, with `decay` on the squared weights."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, val, classes = (train - mean) / std, (val - mean) / std, sorted(set(train_y))
    target = torch.tensor([classes.index(name) for name in train_y])
    weight = torch.zeros(train.shape[1], len(classes), requires_grad=True)
    bias = torch.zeros(len(classes), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(train @ weight + bias, target) + decay * weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    guesses = [classes[n] for n in (val @ weight + bias).argmax(1).tolist()]
    return sum(guess == name for guess, name in zip(guesses, val_y, strict=True)) / len(val_y)


def main(root: Path) -> None:
    folder = root / "grocery-store/dataset"
    model = efficientnet_lite.EfficientNetLite.from_pretrained(prepare.ENCODER).eval()
    last = load_file(prepare.LAST_LAYER)
    photos = {split: groceries.read_photos(folder, split) for split in ("train", "val")}
    features = {split: mean_features(model, [folder / photo.path for photo in photos[split]]) for split in photos}
    table = top1(F.linear(features["train"], last["weight"], last["bias"]), [photo.fine for photo in photos["train"]])
    names = {split: [photo.coarse for photo in photos[split]] for split in photos}
    probe = linear_probe(features["train"], names["train"], features["val"], names["val"])
    share = sum(right for right, _ in table.values()) / sum(count for _, count in table.values())
    prepare.write_json("probe.json", {"probe": probe, "top1": share, "top1_by_class": table})
    print(f"probe {probe:.3f}, top-1 of {len(table)} classes of ImageNet {share:.3f}: {table}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
