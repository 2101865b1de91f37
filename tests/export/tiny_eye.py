"""A user's own vision tower in a module that needs only transformers: importing it registers the tower."""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class TinyEyeConfig(PretrainedConfig):
    model_type = "tiny_eye"
    hidden_size: int = 12
    image_size: int = 24
    patch: int = 8


class TinyEye(PreTrainedModel):
    """Convolutions that read patches of 8 px; their positions are the tokens, row by row."""

    config_class = TinyEyeConfig
    main_input_name = "pixel_values"

    def __init__(self, config: TinyEyeConfig):
        super().__init__(config)
        self.conv = nn.Conv2d(3, config.hidden_size, config.patch, config.patch)
        self.post_init()

    def forward(self, pixel_values: Tensor, **options) -> BaseModelOutput:
        tokens = torch.tanh(self.conv(pixel_values)).flatten(2).transpose(1, 2)
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))


AutoConfig.register("tiny_eye", TinyEyeConfig)
AutoModel.register(TinyEyeConfig, TinyEye)
