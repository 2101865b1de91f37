"""Layers that are computed again: the same gradients, from less that is kept."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mmlab.config.errors import ConfigError
from mmlab.model.activation_checkpointing import checkpoint_activations
from mmlab.model.config import DiTConfig, UNetConfig
from mmlab.model.denoiser import UNet
from mmlab.model.dit import DiT
from tests.model import tiny
from tests.model.tiny_priors import conditions, prior_model, some_codes

WIDE = {"block_out_channels": [8, 16], "layers_per_block": 2, "norm_num_groups": 4, "attention_head_dim": 4}


def frozen_language(tokenizer) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """As in alignment: a frozen language model in eval mode, and a picture's embeddings that learn; rows are packed."""
    language = tiny.language(tokenizer).requires_grad_(False).eval()
    embeds = nn.Parameter(torch.randn(2, 24, language.width, generator=torch.Generator().manual_seed(0)))
    segments = torch.tensor([[1] * 16 + [2] * 8] * 2)
    places = torch.cat([torch.arange(16), torch.arange(8)]).expand(2, -1)

    def run(model: nn.Module) -> Tensor:
        learned = model.get_parameter("embeds")
        keep = torch.ones(2, 24, dtype=torch.bool)
        return model(learned, keep, segments, torch.zeros_like(segments), places, packed=True).square().mean()

    language.register_parameter("embeds", embeds)
    return language, run


def prior(tokenizer) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """With dropout: what is computed again drops the same."""
    model = prior_model("class", dropout=0.3, depth=3).train()
    condition, _ = conditions(model)
    condition = {name: value.detach() for name, value in condition.items()}
    return model, lambda found: found(some_codes(), condition).square().mean()


def transformer(tokenizer) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    model = DiT(DiTConfig(depth=3, width=32, heads=4, patch=2), channels=3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)  # adaLN-Zero would leave the blocks without gradients
    return model, lambda found: found(torch.randn(3, 3, 16, 16), torch.tensor([0, 7, 999]), {}).square().mean()


def unet(tokenizer) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    model = UNet(UNetConfig(architecture=WIDE), 3).train()
    return model, lambda found: found(torch.randn(2, 3, 16, 16), torch.tensor([0, 999]), {}).square().mean()


@pytest.mark.parametrize("build", [frozen_language, prior, transformer, unet])
def test_the_same_gradients_from_less_that_is_kept(build, tokenizer_folder):
    torch.manual_seed(0)
    plain, run = build(tokenizer_folder)
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed)
    kept = {}
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        sizes: list[int] = []

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            loss = run(model)
        loss.backward()
        kept[model] = sum(sizes)
    assert kept[checkpointed] < 0.7 * kept[plain]
    learned = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert learned and all(gradient.abs().max() > 0 for name, gradient in learned.items() if "bias" not in name)
    for name, parameter in checkpointed.named_parameters():
        if name in learned:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, learned[name], rtol=1e-5, atol=1e-7)
    assert checkpointed.state_dict().keys() == plain.state_dict().keys()


def test_a_model_without_layers_is_refused():
    with pytest.raises(ConfigError, match="gradient_checkpointing=true, but this model has no layers"):
        checkpoint_activations(nn.Linear(2, 2))
