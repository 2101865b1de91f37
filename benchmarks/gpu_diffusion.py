"""Training steps of DiT and of a UNet with random weights: diffusers' networks in its scripts' loop, and ours.

Ours draws noise and times on the host, keyed by the samples' seeds; the loop draws them on the device. The first steps,
which are compared, have the same numbers.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_ways import Case, Compiled, Way
from torch import Tensor, nn
from torch.nn import functional as F

from mmlab.config.build import build
from mmlab.config.compose import compose
from mmlab.export.diffusers_modules import transformer
from mmlab.model.blocks import blocks
from mmlab.model.compiled_layers import CompiledLayers
from mmlab.training.flops import FlopCounter

BATCHES = 3


@dataclass(frozen=True)
class Size:
    """Of models and batches.

    Attributes:
        overrides: of the recipe.
        batch: samples.
        side: of pictures, in pixels.
        rounds: steps of each way.
    """

    overrides: tuple[str, ...] = ()
    batch: int = 64
    side: int = 256
    rounds: int = 20


_STAGE = ("model.first_stage.architecture.layers_per_block=1", "+model.first_stage.architecture.norm_num_groups=8")
TINY_DIT = Size(
    (
        *_STAGE,
        "model.first_stage.architecture.block_out_channels=[8,8,8,8]",
        *("model.denoiser.depth=2", "model.denoiser.width=32", "model.denoiser.heads=2"),
    ),
    batch=2,
    side=64,
    rounds=2,
)
TINY_UNET = Size(
    (
        *_STAGE,
        "model.first_stage.architecture.block_out_channels=[8,8,8]",
        "model.denoiser.architecture={block_out_channels:[16,32],attention_head_dim:8}",
        "+model.denoiser.architecture.norm_num_groups=8",
    ),
    batch=2,
    side=32,
    rounds=2,
)


def build_ours(recipe: str, size: Size, device: torch.device) -> Any:
    """The stage of a recipe, with random weights that were made on the device, and its optimizer."""
    source = ["model.first_stage.source=null", "stage.init_from=[]"]
    if "dit" in recipe:
        source.append("model.first_stage.init=random")
    cfg = compose("train", [f"experiment={recipe}", *source, *size.overrides])
    with torch.device(device):
        model = build(cfg.model)
        process = build(cfg.process)
        stage = build(cfg.stage, model=model, optim=build(cfg.optim), process=process)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.denoiser.named_parameters():  # a new DiT returns zeros
        if weight.ndim > 1 or not name.endswith("weight"):
            weight.data.normal_(0, 0.02, generator=generator)
    model.first_stage.set_statistics(torch.zeros(model.first_stage.channels), torch.ones(model.first_stage.channels))
    stage.to(device).train()
    return stage, stage.optim.build(model, 1000)["optimizer"]


class Loop:
    """A step as in diffusers' training scripts.

    Args:
        stage: ours, whose times and noise the first steps take.
        network: called with x_t, times and a batch.
        encode: of a batch; the latents.

    Attributes:
        same: whether times and noise are those of our step; otherwise they are drawn on the device.
    """

    def __init__(
        self,
        stage: Any,
        network: Callable[[Tensor, Tensor, dict[str, Any]], Tensor],
        encode: Callable[[dict[str, Any]], Tensor],
    ):
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        betas = stage.process.betas
        self.scheduler: Any = DDPMScheduler(len(betas), trained_betas=betas.float().numpy())
        self.stage, self.network, self.encode, self.same = stage, network, encode, True

    def loss(self, batch: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            x_0 = self.encode(batch)
        if self.same:
            t, noise = (drawn.to(x_0.device) for drawn in self.stage.process.draw(batch["seeds"], x_0.shape[1:]))
        else:
            noise = torch.randn_like(x_0)
            t = torch.randint(self.scheduler.config.num_train_timesteps, (len(x_0),), device=x_0.device)
        prediction = self.network(self.scheduler.add_noise(x_0, noise, t), t, batch)
        return F.mse_loss(prediction.float(), noise.float())


def mixed(device: torch.device) -> Any:
    """trainer.precision=bf16-mixed on a GPU, fp32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def step_of(loss: Callable[[dict[str, Any]], Tensor], batches: list[dict[str, Any]], device: torch.device) -> Any:
    def step(n: int) -> Tensor:
        with mixed(device):
            value = loss(batches[n])
        value.backward()
        return value.detach()

    return step


def flops_of(stage: Any, batch: dict[str, Any], device: torch.device) -> float:
    """Model FLOPs of our step on a batch."""
    counter = FlopCounter()
    with counter:
        with mixed(device):
            loss = stage.loss(batch, 0.0).mean()
        counter.in_backward = True
        loss.backward()
    for weight in stage.parameters():
        weight.grad = None
    return float(counter.flops)


def entering(layers: CompiledLayers | Compiled, compiled: bool, loop: Loop, optimizer: Any) -> Callable[[], None]:
    def enter() -> None:
        layers.on = compiled
        loop.same = not optimizer.state  # until weights are updated

    return enter


def seeds_of(n: int, size: Size) -> list[int]:
    return list(range(n * size.batch, (n + 1) * size.batch))


def dit(size: Size, device: torch.device) -> Case:
    """DiT-XL/2 from cached latents, with classes."""
    stage, optimizer = build_ours("ldm/imagenet_dit_xl_2", size, device)
    model = stage.model
    latent = model.first_stage.side(size.side)
    with torch.device(device):
        peer = transformer(model.denoiser, model.conditioner, latent)  # in eval mode no class is dropped
    peer_optimizer = type(optimizer)(peer.parameters(), lr=1e-4)
    generator = torch.Generator(device).manual_seed(0)
    shape = (size.batch, model.first_stage.channels, latent, latent)
    batches = []
    for n in range(BATCHES):
        mean, logvar = (torch.randn(shape, device=device, generator=generator) for _ in range(2))
        labels = torch.randint(len(model.conditioner.names), (size.batch,), device=device, generator=generator)
        batches.append({"mean": mean, "logvar": logvar - 4, "labels": labels, "seeds": seeds_of(n, size)})

    def encode(batch: dict[str, Any]) -> Tensor:
        if loop.same:
            return stage.latents(batch)
        return batch["mean"] + (0.5 * batch["logvar"]).exp() * torch.randn_like(batch["mean"])

    loop = Loop(stage, lambda x, t, batch: peer(x, t, batch["labels"]).sample, encode)
    ours, theirs = CompiledLayers(model.denoiser), Compiled(peer.transformer_blocks)
    # Theirs has an embedding of time and class in each block, so only these weights have equal gradients.
    same = [w for block in model.denoiser.blocks for w in (block.query.weight, block.mlp[0].weight)]
    peers = [w for block in peer.transformer_blocks for w in (block.attn1.to_q.weight, block.ff.net[0].proj.weight)]
    step = step_of(lambda batch: stage.loss(batch, 0.0).mean(), batches, device)
    peer_step = step_of(loop.loss, batches, device)
    flops, ways = flops_of(stage, batches[0], device), []
    for compiled in (False, True):
        word = ", compiled" if compiled else ""
        enter = entering(theirs, compiled, loop, peer_optimizer)
        ways.append(Way(f"diffusers{word}", peer_step, peer, peers, peer_optimizer, enter))
        ways.append(Way(f"ours{word}", step, model, same, optimizer, entering(ours, compiled, loop, optimizer)))
    return images(batches, flops, ways, device)


def unet(size: Size, device: torch.device) -> Case:
    """LDM-4's UNet, from pictures, which a frozen VQ-f4 encodes, and from cached latents."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    stage, optimizer = build_ours("ldm/ffhq_f4", size, device)
    first_stage, network = stage.model.first_stage.eval(), stage.model.denoiser.unet
    with torch.device("meta"):
        peer: Any = UNet2DModel.from_config(network.config)
    peer.load_state_dict(network.state_dict(keep_vars=True), assign=True)
    encoder = nn.Sequential(copy.deepcopy(first_stage.encoder), copy.deepcopy(first_stage.quant_conv)).eval()
    half = torch.bfloat16 if device.type == "cuda" else torch.float32  # as the scripts have it under bf16
    encoder.to(half)
    generator = torch.Generator(device).manual_seed(0)
    shape = (size.batch, 3, size.side, size.side)
    pictures: list[dict[str, Any]] = []
    cached: list[dict[str, Any]] = []
    for n in range(BATCHES):
        pixels = torch.randint(256, shape, device=device, dtype=torch.uint8, generator=generator)
        pictures.append({"pixel_values": pixels, "seeds": seeds_of(n, size)})
        with torch.no_grad():
            cached.append({"mean": first_stage.encode(pixels / 127.5 - 1).mean, "seeds": seeds_of(n, size)})

    def encode(batch: dict[str, Any]) -> Tensor:
        return encoder((batch["pixel_values"] / 127.5 - 1).to(half)).float()

    loop = Loop(stage, lambda x, t, batch: peer(x, t).sample, encode)
    ours, theirs = CompiledLayers(network), Compiled(blocks(peer))
    weights = list(network.parameters())

    def loss(batch: dict[str, Any]) -> Tensor:
        return stage.loss(batch, 0.0).mean()

    kinds: tuple[tuple[str, Any, nn.Module, CompiledLayers | Compiled, float | None], ...] = (
        ("diffusers", step_of(loop.loss, pictures, device), nn.ModuleList([peer, encoder]), theirs, None),
        ("ours", step_of(loss, pictures, device), stage.model, ours, None),
        ("ours, cached latents", step_of(loss, cached, device), network, ours, flops_of(stage, cached[0], device)),
    )
    ways = [
        Way(name + word, step, module, weights, optimizer, entering(layers, compiled, loop, optimizer), flops)
        for compiled, word, order in ((False, "", kinds), (True, ", compiled", kinds[::-1]))
        for name, step, module, layers, flops in order
    ]
    return images(pictures, flops_of(stage, pictures[0], device), ways, device)


def images(batches: list[dict[str, Any]], flops: float, ways: list[Way], device: torch.device) -> Case:
    return Case(
        unit="images",
        amounts=[float(len(batch["seeds"])) for batch in batches],
        flops=[flops] * len(batches),
        ways=ways,
        tolerance=5e-3 if device.type == "cuda" else 1e-4,
    )
