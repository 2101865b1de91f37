"""One training step with the same weights and questions: transformers' LLaVA against ours.

Eight images with ten questions each. transformers has one padded row per question, each with the image, and computes
logits at all positions; ours shares an image's tokens between its questions and computes logits only where there is a
loss. Rounds are interleaved and medians reported; both losses are printed and must agree.

    python benchmarks/vlm_step.py
"""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import LlavaConfig, LlavaForConditionalGeneration

from mmlab.data.collate import ChatCollate
from mmlab.data.config import ImageTextDataConfig, Prompt
from mmlab.data.mixture import Source
from mmlab.data.reader import LocalBatches, OnePass
from mmlab.data.sample_types import ImageSpec
from mmlab.data.shard_files import write_shards
from mmlab.data.sources.shapes import shapes
from mmlab.data.tokenizer import train_tokenizer
from mmlab.model.config import LanguageModelConfig, MLPConnectorConfig, VisionEncoderConfig
from mmlab.model.connector import MLPConnector
from mmlab.model.language import LanguageModel
from mmlab.model.vision import VisionEncoder
from mmlab.model.vlm import VisionLanguageModel
from mmlab.stage.token_loss import supervised

ROUNDS = 7
EYE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
TONGUE = {**EYE, "max_position_embeddings": 512, "model_type": "llama"}


def ours(model: VisionLanguageModel, batch: dict) -> torch.Tensor:
    keep, targets = supervised(batch["labels"], batch["segment_ids"])
    batch = {**batch, "packed": bool((batch["segment_ids"] > 1).any())}
    return model.cross_entropy(batch, model.features(batch["pixel_values"]), keep, targets) / len(targets)


def theirs(model: LlavaForConditionalGeneration, batch: dict) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], pixel_values=batch["pixels"], attention_mask=batch["mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())


def single_rows(batch: dict, model: VisionLanguageModel, image_token: int) -> dict:
    """The same questions, one per row, each with its own copy of the image."""
    rows, labels, pictures = [], [], []
    for row in range(len(batch["input_ids"])):
        segments, contexts = batch["segment_ids"][row], batch["context_ids"][row]
        place = next(n for n, (r, _) in enumerate(batch["image_positions"].tolist()) if r == row)
        picture = int(batch["image_features"][place]) // model.vision.tokens_per_image
        start = int(batch["image_positions"][place, 1])
        ids = batch["input_ids"][row].clone()
        ids[start : start + model.vision.tokens_per_image] = image_token
        for segment in range(1, int(segments.max()) + 1):
            own = segments == segment
            context = int(contexts[own][0])
            if context == 0 and (contexts == segment).any():
                continue
            take = own | ((segments == context) if context else False)
            rows.append(ids[take])
            labels.append(batch["labels"][row][take])
            pictures.append(picture)
    pad = torch.nn.utils.rnn.pad_sequence
    pixels = (batch["pixel_values"][pictures] - model.vision.mean) / model.vision.std
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": pad(rows, True), "labels": pad(labels, True, -100), "pixels": pixels, "mask": mask}


def twin(model: VisionLanguageModel) -> tuple[LlavaForConditionalGeneration, int]:
    """transformers' LLaVA with the same weights and one extra token for images."""
    image_token = model.language.config.vocab_size
    text = model.language.config.to_dict() | {"vocab_size": image_token + 1}
    config = LlavaConfig(
        vision_config=model.vision.config.to_dict(),
        text_config=text,
        image_token_index=image_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    peer = LlavaForConditionalGeneration(config)
    with tempfile.TemporaryDirectory() as folder:
        model.vision.save(Path(folder))
        peer.model.vision_tower.load_state_dict(type(peer.model.vision_tower).from_pretrained(folder).state_dict())
    peer.model.multi_modal_projector.linear_1.load_state_dict(model.connector.layers[0].state_dict())
    peer.model.multi_modal_projector.linear_2.load_state_dict(model.connector.layers[2].state_dict())
    weights = {name: w.detach().clone() for name, w in model.language.causal.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        # The image token's logit is 0 everywhere, which raises the loss by about one part in the vocabulary size.
        weights[name] = torch.cat([weights[name], torch.zeros(1, weights[name].shape[1])])
    peer.lm_head.load_state_dict({"weight": weights.pop("lm_head.weight")})
    peer.model.language_model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items()})
    return peer, image_token


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        index, _ = write_shards(shapes(8, max_objects=2), Path(folder) / "shards", total=8, quiet=True)
        train_tokenizer([index], Path(folder) / "tokenizer", quiet=True)
        vision = VisionEncoder(
            VisionEncoderConfig(
                init="random",
                architecture={**EYE, "model_type": "clip_vision_model", "image_size": 64, "patch_size": 8},
            )
        )
        language = LanguageModel(
            LanguageModelConfig(init="random", architecture=TONGUE, tokenizer=str(Path(folder) / "tokenizer"))
        )
        model = VisionLanguageModel(vision, partial(MLPConnector, MLPConnectorConfig(depth=2)), language)
        spec = ImageSpec(64, "stretch", vision.tokens_per_image)
        data = ImageTextDataConfig(seed=0, max_length=512)
        collate = ChatCollate(data, Prompt(), language.tokenizer, spec)
        batch = LocalBatches([Source("shapes", index)], collate, OnePass(8, 8), data)[0]
    peer, image_token = twin(model)
    rows = single_rows(batch, model, image_token)
    steps = {
        "transformers, a row per question": lambda: theirs(peer, rows),
        "ours, shared images": lambda: ours(model, batch),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses = {}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            loss = step()
            loss.backward()
            seconds[name].append(time.perf_counter() - start)
            losses[name] = loss.item()
    for name, times in seconds.items():
        median = statistics.median(times[1:])
        print(f"{name:<34} {median * 1000:>8.1f} ms a step (best {min(times) * 1000:.1f}), loss {losses[name]:.4f}")
    print(f"{len(rows['input_ids'])} questions about 8 images")


if __name__ == "__main__":
    main()
