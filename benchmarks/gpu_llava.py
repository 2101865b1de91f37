"""LLaVA's training steps with random weights: transformers' `LlavaForConditionalGeneration` and ours.

Both have the same weights themselves, no copies, and the same conversations. transformers gets padded rows, one for
each conversation or question, as its collators make them, and then one row of all conversations.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from gpu_conversations import Sample, Size, draw_rows, our_batch, their_batches, their_row
from gpu_ways import Case, Compiled, Way
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from mmlab.config.build import build
from mmlab.config.compose import compose
from mmlab.model.blocks import blocks
from mmlab.model.compiled_layers import CompiledLayers
from mmlab.model.packed_rows import ROWS

BATCHES, EXTRA = 3, 64
"""`EXTRA`: the checkpoints for transformers have so many tokens more than Vicuna, the first for places of pictures."""


def build_ours(recipe: str, size: Size, device: torch.device, dtype: torch.dtype) -> Any:
    """The stage of a recipe, with random weights that were made on the device."""
    random_init = [f"model.{part}.init=random" for part in ("vision", "language")]
    no_source = [f"model.{part}.source=null" for part in ("vision", "language")]
    own = [
        "stage.init_from=[]",
        "stage.feature_cache_mb=0",
        f"model.language.architecture.vocab_size={size.vocabulary + EXTRA}",
    ]
    cfg = compose("train", [f"experiment={recipe}", *random_init, *no_source, *own, *size.overrides])
    with torch.device("meta"):
        model = build(cfg.model)
        stage = build(cfg.stage, model=model, optim=build(cfg.optim))
    # As trainer.precision=bf16-mixed has frozen parts, and bf16-true those that are trained.
    for name, part in model.named_children():
        part.to(dtype if name in stage.frozen or "language" not in stage.frozen else torch.float32)
    model.to_empty(device=device)
    fill(model, device)
    language, vision = model.language.causal.model, model.vision
    language.rotary_emb = type(language.rotary_emb)(language.config).to(device)
    for name, values in (("mean", vision.image_mean), ("std", vision.image_std)):
        getattr(vision, name).copy_(torch.tensor(values).view(3, 1, 1) * 255)
    fix_positions(vision.tower)
    stage.to(device).train()
    return stage, stage.optim.build(model, 1000)["optimizer"]


def fill(model: nn.Module, device: torch.device) -> None:
    """Normal weights with a standard deviation of 0.02; those of norms around 1."""
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        weight.data.normal_(0, 0.02, generator=generator)
        if weight.ndim == 1 and name.endswith("weight"):
            weight.data.add_(1)


def fix_positions(tower: nn.Module) -> None:
    for module in tower.modules():
        if isinstance(places := module._buffers.get("position_ids"), Tensor):
            module._buffers["position_ids"] = torch.arange(places.shape[-1], device=places.device).expand_as(places)


def build_theirs(model: Any, image_token: int, device: torch.device) -> Any:
    """transformers' LLaVA with our weights themselves."""
    config = LlavaConfig(
        vision_config=model.vision.config.to_dict(),
        text_config=model.language.config.to_dict(),
        image_token_index=image_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with torch.device("meta"):
        peer = LlavaForConditionalGeneration(config)
    options: Any = {"assign": True}
    learning = {weight: weight.requires_grad for weight in model.parameters()}
    with model.vision.whole_tower():
        peer.model.vision_tower.load_state_dict(model.vision.tower.state_dict(keep_vars=True), **options)
    first, _, second = model.connector.layers
    peer.model.multi_modal_projector.linear_1.load_state_dict(first.state_dict(keep_vars=True), **options)
    peer.model.multi_modal_projector.linear_2.load_state_dict(second.state_dict(keep_vars=True), **options)
    weights = model.language.causal.state_dict(keep_vars=True)
    peer.lm_head.load_state_dict({"weight": weights.pop("lm_head.weight")}, **options)
    peer.model.language_model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items()}, **options)
    peer.model.language_model.rotary_emb = model.language.causal.model.rotary_emb
    for module in peer.modules():
        if isinstance(places := module._buffers.get("position_ids"), Tensor):
            module._buffers["position_ids"] = torch.arange(places.shape[-1], device=device)[None]
    for weight, learns in learning.items():  # which `assign` has set as in a new model
        weight.requires_grad_(learns)
    return peer.train()


def model_flops(model: Any, rows: list[list[Sample]], trained: bool) -> float:
    """Of forward and backward pass without padding and repetition; attention between all tokens of a text counts.

    A frozen language model has no gradients of weights: two products for each of its weights, not three.
    """
    causal, tokens = model.language.causal, model.tokens_per_image
    samples = [sample for row in rows for sample in row]
    pairs, supervised = 0, 0
    for sample in samples:
        before, texts = len(sample.before.ids), [len(text.ids) for text in sample.texts]
        shared = len(texts) > 1
        pairs += before**2 + sum(t * (before + t) for t in texts) if shared else (before + texts[0]) ** 2
        supervised += sum(int((text.labels != -100).sum()) for text in sample.texts)
    body, head = matrices(causal.model.layers), causal.lm_head.weight.numel()
    language = (6 if trained else 4) * (body * sum(map(len, samples)) + head * supervised)
    language += 3 * 4 * causal.config.num_hidden_layers * causal.config.hidden_size * pairs
    layers, vision = model.vision._layers, model.vision.config
    seen = tokens + model.vision.prefix
    encoder = 2 * matrices(layers) * seen + 4 * len(layers) * vision.hidden_size * seen**2
    encoder += 2 * 3 * vision.patch_size**2 * vision.hidden_size * tokens
    first, _, second = model.connector.layers
    connector = (4 * first.weight.numel() + 6 * second.weight.numel()) * tokens  # no gradient of the features
    return float(language + (encoder + connector) * len(samples))


def matrices(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.ndim == 2)


class Sides:
    """Both models with a recipe's stage, and the same batches for each.

    Args:
        kind: of the samples, see `draw_sample`.
        recipe: of LLaVA.
        size: of models and batches.
        device: a GPU, or a CPU, where all is in fp32.
    """

    def __init__(self, kind: str, recipe: str, size: Size, device: torch.device):
        self.device, self.half = device, device.type == "cuda"
        self.stage, self.optimizer = build_ours(recipe, size, device, torch.bfloat16 if self.half else torch.float32)
        self.model = self.stage.model
        self.peer = build_theirs(self.model, size.vocabulary, device)
        self.trained = "language" not in self.stage.frozen
        tokens, side = self.model.tokens_per_image, self.model.vision.image_size
        self.rows = [draw_rows(seed, kind, tokens, size) for seed in range(BATCHES)]
        generator = torch.Generator(device).manual_seed(0)
        self.batches, self.padded, self.flat = [], [], []
        for rows in self.rows:
            shape = (sum(map(len, rows)), 3, side, side)
            pixels = torch.randint(256, shape, device=device, dtype=torch.uint8, generator=generator)
            normal = self.model.vision.normalize(pixels)
            self.batches.append(our_batch(rows, pixels, tokens, size.length))
            self.padded.append(their_batches(rows, normal, device))
            self.flat.append([their_row(rows, normal, device)])
        self.layers, self.peer_layers = CompiledLayers(self.model), Compiled(blocks(self.peer))
        self.settings = self.model.language.settings

    def mixed(self) -> Any:
        """trainer.precision=bf16-mixed where the language model is frozen; bf16-true otherwise."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half and not self.trained)

    def our_step(self, n: int, kind: str) -> Tensor:
        batch = self.stage.on_before_batch_transfer(self.batches[n], 0)
        batch = {name: x.to(self.device) if isinstance(x, Tensor) else x for name, x in batch.items()}
        ways = self.model.language.ways
        ways.clear()
        with self.mixed():
            total, count = self.stage.loss(batch)
        if not any(f" {kind} (" in way for way in ways):
            raise RuntimeError(f"{kind} cannot run here: {next(iter(ways), None)}")
        loss = total / count
        loss.backward()
        return loss.detach()

    def their_step(self, batches: list[dict[str, Any]]) -> Tensor:
        """Of micro-batches, whose losses count by their supervised tokens."""
        counts = [int((batch["labels"] != -100).sum()) for batch in batches]
        whole = torch.zeros((), device=self.device)
        for batch, count in zip(batches, counts, strict=True):
            with self.mixed():
                loss = self.peer(**batch, use_cache=False).loss * (count / sum(counts))
            loss.backward()
            whole += loss.detach()
        return whole

    def attend(self, kind: str, compiled: bool) -> Callable[[], None]:
        def enter() -> None:
            self.model.language.settings = replace(self.settings, attention="sdpa" if kind == "dense" else kind)
            self.model.language.causal.config._attn_implementation = "sdpa" if kind == "dense" else ROWS
            self.layers.on = compiled

        return enter

    def peer_attends(self, implementation: str, compiled: bool) -> Callable[[], None]:
        def enter() -> None:
            self.peer.model.language_model.config._attn_implementation = implementation
            self.peer_layers.on = compiled

        return enter


def llava(kind: str, recipe: str, size: Size, device: torch.device) -> Case:
    """A case of captions (stage 1), conversations or questions (stage 2)."""
    sides = Sides(kind, recipe, size, device)
    weights = [weight for weight in sides.model.parameters() if weight.requires_grad]
    shared = kind == "questions"
    kinds = (["flex"] if shared else ["varlen", "flex"]) if sides.half else ["blocks"]
    flexible = "flex_attention" if sides.half else "sdpa"
    ways: list[Way] = []

    def add(name: str, step: Callable[[int], Tensor], module: nn.Module, enter: Callable[[], None]) -> None:
        ways.append(Way(name, step, module, weights, sides.optimizer, enter))

    def theirs(compiled: bool) -> None:
        word = ", compiled" if compiled else ""
        enter = sides.peer_attends("sdpa", compiled)
        add(f"transformers, padded rows{word}", lambda n: sides.their_step(sides.padded[n]), sides.peer, enter)
        if not shared:  # it cannot tell which questions share a picture
            enter = sides.peer_attends(flexible, compiled)
            name = f"transformers, one row, {flexible}{word}"
            add(name, lambda n: sides.their_step(sides.flat[n]), sides.peer, enter)

    def ours(compiled: bool, kinds: list[str]) -> None:
        for kind in kinds:
            enter = sides.attend(kind, compiled)
            name = f"ours, {kind}{', compiled' if compiled else ''}"
            add(name, lambda n, kind=kind: sides.our_step(n, kind), sides.model, enter)

    # What comes last is left out if time is short.
    theirs(False)
    ours(False, [*kinds, "dense"])
    ours(True, kinds[:1])
    theirs(True)
    ours(True, [*kinds[1:], "dense"])
    return Case(
        unit="tokens",
        amounts=[float(sum(len(sample) for row in rows for sample in row)) for rows in sides.rows],
        flops=[model_flops(sides.model, rows, sides.trained) for rows in sides.rows],
        ways=ways,
        tolerance=2e-3 if sides.half else 1e-4,
    )
