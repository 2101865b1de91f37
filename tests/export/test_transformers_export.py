"""Exported runs in transformers: the same pixels, token ids, logits and tokens as in mmlab."""

import io
import json
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mmlab import cli
from mmlab.config.compose import compose
from mmlab.config.errors import ConfigError
from mmlab.data.config import ImageTextDataConfig, Prompt
from mmlab.data.images import decode_image
from mmlab.data.packing import Shown, place_pictures
from mmlab.data.sample_types import ImageSpec
from mmlab.data.turns import IMAGE, Turn
from mmlab.evaluate.answers import Answerer
from mmlab.export.processors import image_processor
from mmlab.export.transformers_export import (
    end_tokens,
    export_language,
    export_vision_language,
)
from mmlab.model.config import LanguageModelConfig, MLPConnectorConfig, VisionEncoderConfig
from mmlab.model.connector import LinearConnector, MLPConnector, Newline
from mmlab.model.language import LanguageModel, LanguageOnly
from mmlab.model.vision import VisionEncoder
from mmlab.model.vlm import VisionLanguageModel
from mmlab.runs.run import finish
from mmlab.stage.assembly import build_stage
from mmlab.training.artifacts import describe_base, describe_frozen, save_parts
from mmlab.training.config import LoRAConfig
from mmlab.training.filling import fill_parts
from mmlab.training.lora import add_adapters
from tests.evaluate.tiny_scores import make_run
from tests.export.tiny_chats import messages, photo, png, showing
from tests.export.tiny_eye import TinyEyeConfig
from tests.model import tiny
from tests.tiny_pictures import placed, square

ROOT = Path(__file__).parents[2]
QUESTION = "What is it?"
FP32 = torch.float32
CROP = ImageTextDataConfig(aspect="crop")
LATER = [Turn("gpt", "A square."), Turn("human", "Who?")]


def raw(answerer: Answerer, dialogue: list[Turn], pixels: torch.Tensor) -> tuple[list[int], torch.Tensor, list[int]]:
    """(ids with -1 for the picture, logits of the row, new tokens) of our model."""
    model: Any = answerer.model
    one = answerer.tokens(dialogue, [square(pixels, model.tokens_per_image)])
    row = torch.tensor([one.input_ids])
    places = placed([(0, start) for start in one.image_starts], model.tokens_per_image).values()
    with torch.no_grad():
        embeds = model.embed(row, model.features(pixels[None]), *places)
        logits = model.language.causal(inputs_embeds=embeds).logits[0]
        new = model.generate(row, torch.ones_like(row), pixels[None], *places, **answerer.options)[0].tolist()
    ids = list(one.input_ids)
    for start in one.image_starts:
        ids[start : one.shared] = [-1] * (one.shared - start)
    return ids, logits, new


CASES = {
    "clip, linear, llama": (("clip", "llama", "linear", "llama_3"), {}, "stretch", Prompt("v1")),
    "siglip, mlp, qwen2": (("siglip", "qwen2", "mlp", "gpt_2"), {}, "crop", Prompt("tokenizer", system="Be brief.")),
    "class token": (("clip", "llama", "mlp", "llama_2"), {"features": "cls_patch"}, "pad", Prompt("llama_2")),
    "last layer": (("clip", "gpt2", "linear", "gpt_2"), {"feature_layer": -1}, "pad", Prompt("chatml", system="")),
    "dinov2": (("dinov2", "llama", "linear", "metaspace"), {}, "crop", Prompt("v1", system="Be brief.")),
    "first layer": (("clip", "llama", "linear", "llama_2"), {"feature_layer": 1}, "crop", Prompt("v0")),
}


def build(tokenizers, eye, tongue, connector, tokenizer, **options) -> VisionLanguageModel:
    torch.manual_seed(0)
    joint = {"mlp": partial(MLPConnector, MLPConnectorConfig(depth=2)), "linear": LinearConnector}[connector]
    vision = tiny.vision(eye, **options)
    return VisionLanguageModel(vision, joint, tiny.language(tokenizers[tokenizer], tongue)).eval()


def compare(model: VisionLanguageModel, prompt: Prompt, aspect: str, out: Path) -> None:
    """Export, load and compare: ids, pixels, logits and greedy tokens."""
    answerer = Answerer(model, prompt, ImageTextDataConfig(aspect=aspect), 12)
    picture = photo(model.vision.image_size, model.vision.image_size)
    pixels = decode_image(png(picture), answerer.spec)
    dialogues = [
        [Turn("human", f"{IMAGE}\n{QUESTION}", images=1)],
        [Turn("human", f"{IMAGE}\n{QUESTION}", images=1), *LATER],
    ]
    ours = [raw(answerer, dialogue, pixels) for dialogue in dialogues]
    vocabulary = model.language.vocabulary
    export_vision_language(model, prompt, ImageTextDataConfig(aspect=aspect), FP32, out)
    exported, processor = AutoModelForImageTextToText.from_pretrained(out).eval(), AutoProcessor.from_pretrained(out)
    image_id = exported.config.image_token_id
    assert processor.tokenizer.convert_ids_to_tokens(image_id) == IMAGE
    assert exported.dtype == FP32
    for (ids, logits, new), later in zip(ours, ([], LATER), strict=True):
        inputs = processor.apply_chat_template(
            messages(QUESTION, picture, *later),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert inputs["input_ids"][0].tolist() == [image_id if token == -1 else token for token in ids]
        with torch.no_grad():
            theirs = exported(**inputs).logits[0]
        torch.testing.assert_close(theirs[:, :vocabulary], logits, rtol=1e-5, atol=1e-5)
        given = {"max_new_tokens": 12} if later else {"generation_config": exported.generation_config}
        answer = exported.generate(**inputs, **given)[0, len(ids) :].tolist()
        assert answer[: len(new)] == new and (len(new) == len(answer) if later else len(answer) >= len(new))
    assert exported.generation_config.max_new_tokens == 256 and not exported.generation_config.do_sample


@pytest.mark.parametrize("case", CASES)
def test_llava_gives_the_same_ids_logits_and_tokens(case, tokenizers, tmp_path):
    parts, options, aspect, prompt = CASES[case]
    compare(build(tokenizers, *parts, **options), prompt, aspect, tmp_path / "out")


PICTURES = [photo(40, 22), photo(16, 33)]
SEVERAL = {
    "one picture": [Turn("human", f"{IMAGE}\n{QUESTION}", images=1)],
    "two in a question": [Turn("human", f"Is {IMAGE} larger than {IMAGE}?", images=2)],
    "two turns": [Turn("human", f"{IMAGE}\nWho?", images=1), LATER[0], Turn("human", f"{IMAGE}\n And?", images=1)],
}


@torch.no_grad()
def compare_several(model: VisionLanguageModel, prompt: Prompt, data: ImageTextDataConfig, out: Path) -> Any:
    """Export, load and compare dialogues of several pictures, which have to be resized: as `compare`."""
    answerer, ours = Answerer(model, prompt, data, 8), []
    shown = answerer.decode([png(picture) for picture in PICTURES])
    for dialogue in SEVERAL.values():
        one = answerer.tokens(dialogue, shown)
        first = zip(shown, one.image_starts, strict=False)
        batch = place_pictures([Shown(picture, 0, start) for picture, start in first], answerer.spec.tokens, 16)
        ids, pixels = torch.tensor([one.input_ids]), batch["pixel_values"]
        places = batch["image_positions"], batch["image_features"]
        logits = model.language.causal(inputs_embeds=model.embed(ids, model.features(pixels), *places)).logits
        new = model.generate(ids, torch.ones_like(ids), pixels, *places, **answerer.options)
        ids[0, places[0][:, 1]] = -1
        ours.append((ids, model.vision.normalize(pixels), logits, new[0].tolist()))
    vocabulary = model.language.vocabulary
    _, notes = export_vision_language(model, prompt, data, FP32, out)
    exported, processor = AutoModelForImageTextToText.from_pretrained(out).eval(), AutoProcessor.from_pretrained(out)
    for dialogue, (ids, pixels, logits, new) in zip(SEVERAL.values(), ours, strict=True):
        inputs = processor.apply_chat_template(
            showing(dialogue, PICTURES),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert torch.equal(inputs["input_ids"], torch.where(ids < 0, exported.config.image_token_id, ids))
        tiles = inputs["pixel_values"].flatten(0, -4)
        tiles = tiles[tiles.flatten(1).abs().sum(1) > 0]  # of fewer tiles than another picture's, the rest is zero
        torch.testing.assert_close(tiles, pixels, rtol=0, atol=0.05)
        inputs["pixel_values"] = pixels
        theirs = exported(**inputs).logits[..., :vocabulary]
        torch.testing.assert_close(theirs, logits, rtol=1e-5, atol=1e-5)
        answer = exported.generate(**inputs, max_new_tokens=8)[0, ids.shape[1] :].tolist()
        assert answer[: len(new)] == new
    assert not any("shows" in note for note in notes)
    return exported


@pytest.mark.parametrize("aspect", ["stretch", "anyres"])
def test_several_pictures_give_the_same_ids_logits_and_tokens(aspect, tokenizers, tmp_path):
    """Squares as `LlavaForConditionalGeneration`, tiles as `LlavaNextForConditionalGeneration`."""
    model = build(tokenizers, "clip", "llama", "mlp", "llama_3")
    if aspect == "anyres":
        model.newline = Newline(24)
    data = ImageTextDataConfig(aspect=aspect, grids=[[1, 2], [2, 1], [2, 2], [3, 1]])
    exported = compare_several(model, Prompt("v1"), data, tmp_path / "out")
    name = {"stretch": "Llava", "anyres": "LlavaNext"}[aspect]
    assert type(exported).__name__ == f"{name}ForConditionalGeneration"


@pytest.mark.parametrize("patch", [4, None])
def test_tiles_of_a_tower_that_joins_patches_are_refused(tokenizers, tmp_path, patch):
    """transformers counts the tower's patches, not its features."""
    model = build(tokenizers, "clip", "llama", "mlp", "llama_3")
    model.newline = Newline(24)
    model.vision.tower.config.patch_size = patch
    with pytest.raises(ConfigError, match="takes a feature for each patch of a tile, but the tower clip_vision_model"):
        export_vision_language(model, Prompt("v1"), ImageTextDataConfig(aspect="anyres"), FP32, tmp_path / "out")


@pytest.mark.parametrize(("template", "tongue"), [("minigpt4", "llama"), ("minigpt4_llama_2", "qwen2")])
def test_minigpt4_gives_the_same_ids_logits_and_tokens(template, tongue, tokenizers, tmp_path):
    model = tiny.minigpt4(tokenizers["llama_2"], tongue)
    with torch.no_grad():
        nn.init.normal_(model.qformer.norm.weight)
        nn.init.normal_(model.qformer.norm.bias)
    compare(model, Prompt(template), "stretch", tmp_path / "out")


@pytest.mark.parametrize("aspect", ["stretch", "crop", "pad"])
def test_an_image_has_the_same_pixels(aspect):
    """Up to rounding, which differs between Pillow and torch: by 1, and by 2 where bicubic overshoots."""
    raw = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    for size in (24, 56):
        spec = ImageSpec(size, aspect)
        processed = image_processor(spec, mean, std)
        for width, height in ((size, size), (64, 48), (48, 71), (200, 9), (9, 200), (30, 29), (90, 60)):
            image = photo(width, height)
            ours = decode_image(png(image), spec).numpy().astype(int)
            theirs = processed(image, **raw)["pixel_values"][0]
            assert theirs.shape == (3, size, size)
            difference = np.abs(theirs - ours)
            assert difference.max() <= 2 and difference.mean() < 0.25, (width, height)
            assert difference.max() == 0 or (width, height) != (size, size)
        for mode in ("L", "P", "RGBA", "CMYK", "1"):
            image = photo(size, size, mode)
            data = io.BytesIO()
            image.save(data, "JPEG" if mode == "CMYK" else "PNG")
            opened = Image.open(data)
            opened.load()
            theirs = processed(opened, **raw)["pixel_values"][0]
            assert np.array_equal(theirs, decode_image(data.getvalue(), spec).numpy()), mode


def test_a_file_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "turned.png").write_bytes(png(photo(40, 24), exif=exif))
    processed = image_processor(ImageSpec(24, "stretch"), [0.5] * 3, [0.5] * 3)
    read = processed.fetch_images(str(tmp_path / "turned.png"))
    theirs = processed(read, do_rescale=False, do_normalize=False)["pixel_values"][0]
    ours = decode_image((tmp_path / "turned.png").read_bytes(), ImageSpec(24, "stretch")).numpy()
    assert np.abs(np.array(theirs) - ours).max() <= 2
    assert np.abs(theirs - decode_image(png(photo(40, 24)), ImageSpec(24, "stretch")).numpy().astype(int)).max() > 50


def test_a_language_model_gives_the_same_ids_and_tokens(tokenizers, tmp_path):
    torch.manual_seed(0)
    model = LanguageOnly(tiny.language(tokenizers["llama_2"])).eval()
    prompt = Prompt("v1", pictures="none")
    answerer = Answerer(model, prompt, ImageTextDataConfig(aspect="stretch"), 12)
    asked = [Turn("human", QUESTION), *LATER]
    one = answerer.tokens(asked, [])
    row = torch.tensor([one.input_ids])
    new = model.language.generate(model.language.embed(row), torch.ones_like(row), **answerer.options)
    export_language(model, prompt, FP32, tmp_path)
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    talk = [{"role": ("user", "assistant")[i % 2], "content": turn.text} for i, turn in enumerate(asked)]
    inputs = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    assert inputs["input_ids"].tolist() == [one.input_ids]
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=12)[:, len(one) :], new)
    assert loaded.config.vocab_size == model.language.vocabulary and IMAGE not in tokenizer.get_vocab()


def test_a_tokenizer_that_transformers_replaces_is_refused(tokenizers, tmp_path):
    """It builds its own class for this type of model from the vocabulary."""
    model = LanguageOnly(tiny.language(tokenizers["llama_2"], "qwen2")).eval()
    with pytest.raises(ConfigError, match="loads a Qwen2Tokenizer for this type of model, which gives other token ids"):
        export_language(model, Prompt("v1", pictures="none"), FP32, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("tongue", ["llama", "gpt2"])
def test_adapters_beside_the_weights_are_those_that_were_merged(tongue, tokenizers, tmp_path):
    parts = ["vision", "connector", "language"]

    def built() -> VisionLanguageModel:
        return build(tokenizers, "clip", tongue, "mlp", "llama_3")

    model = built()
    save_parts(model, parts, tmp_path / "base" / "artifacts", {}, {})
    bases = describe_base(model, ["vision", "language"], {})
    add_adapters(model, {"vision": LoRAConfig(rank=2, alpha=4), "language": LoRAConfig(rank=4, alpha=16)})
    for name, weight in model.named_parameters():
        weight.add_(torch.randn_like(weight) * (0.1 if "lora_" in name else 0))
    save_parts(model, parts, tmp_path / "run" / "artifacts", {}, {}, bases)
    runs = [tmp_path / "base", tmp_path / "run"]
    adapters = {name: tmp_path / "run" / "artifacts" / name for name in ("vision", "language")}
    prompt, loaded = Prompt("v1", system=""), []
    for merge in (True, False):
        fill_parts(model := built(), runs, merge=merge)
        out = tmp_path / str(merge)
        line, _ = export_vision_language(model.eval(), prompt, CROP, FP32, out, {} if merge else adapters)
        scope = {"PeftModel": PeftModel, "LlavaForConditionalGeneration": AutoModelForImageTextToText}
        loaded.append(eval(line, {**scope, "AutoProcessor": AutoProcessor})[0].eval())
    processor = AutoProcessor.from_pretrained(tmp_path / "True")
    inputs = processor.apply_chat_template(
        messages("Who?", photo(16, 16)),
        add_generation_prompt=True,
        return_dict=True,
        tokenize=True,
        return_tensors="pt",
    )
    whole, apart = (each(**inputs).logits for each in loaded)
    torch.testing.assert_close(apart, whole, rtol=1e-5, atol=1e-5)
    with loaded[1].disable_adapter():
        assert not torch.allclose(loaded[1](**inputs).logits, whole, atol=1e-2)


def test_an_adapter_of_the_connector_is_not_kept_apart(tokenizers, tmp_path):
    model = tiny.vlm(tokenizers["gpt_2"])
    bases = describe_base(model, ["connector"], {})
    add_adapters(model, {"connector": LoRAConfig(rank=2)})
    save_parts(model, ["connector"], tmp_path / "run", {}, {}, bases)
    adapters = {"connector": tmp_path / "run" / "connector"}
    with pytest.raises(ConfigError, match=r"adapter of a \w*Connector cannot be kept .* merge=false out"):
        export_vision_language(tiny.vlm(tokenizers["gpt_2"]), Prompt("v1"), CROP, FP32, tmp_path / "out", adapters)


def test_weights_are_stored_in_the_given_dtype(tokenizers, tmp_path):
    export_vision_language(tiny.vlm(tokenizers["gpt_2"]), Prompt("v1"), CROP, torch.bfloat16, tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}


def test_rows_for_the_picture_token_are_never_chosen(tokenizers, tmp_path):
    model = tiny.vlm(tokenizers["llama_3"])
    rows = model.language.vocabulary
    with torch.no_grad():
        model.language.causal.lm_head.weight.add_(torch.randn(24))  # so that most logits can be negative
    export_vision_language(model, Prompt("v1"), CROP, FP32, tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    head = loaded.get_output_embeddings().weight
    assert len(head) % 64 == 0 and len(head) > rows
    logits = torch.randn(200, 24) @ head.T
    assert logits.argmax(1).max() < rows and (logits.amax(1) < 0).any()


def test_what_ends_an_answer(tokenizers):
    """A special token, or any token with the text of the stop; of a stop of several tokens the last one."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["gpt_2"])
    eos, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert end_tokens(tokenizer, Prompt("chatml")) == ({eos, end}, [])
    ends, notes = end_tokens(tokenizer, Prompt("plain"))
    assert ends == {eos} | {i for i in range(eos) if "\n" in tokenizer.decode([i])}
    assert len(ends) > 2 and notes == ["the text of an answer ends with '\\n', which mmlab removes."]
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["llama_2"])
    ends, notes = end_tokens(tokenizer, Prompt("minigpt4"))
    assert ends == {2, tokenizer.convert_tokens_to_ids("#")}
    assert notes[1] == "answers also end at the token '#', the last one of '###'."


def own_eye(tokenizers, width: int = 12) -> VisionLanguageModel:
    torch.manual_seed(0)
    settings = VisionEncoderConfig(
        init="random",
        architecture={"model_type": TinyEyeConfig.model_type, "hidden_size": width},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.3, 0.4],
    )
    return VisionLanguageModel(VisionEncoder(settings), LinearConnector, tiny.language(tokenizers["llama_3"])).eval()


def test_a_users_own_tower_is_exported(tokenizers, tmp_path):
    compare(own_eye(tokenizers), Prompt("v1"), "crop", tmp_path / "out")
    line, _ = export_vision_language(own_eye(tokenizers), Prompt("v1"), CROP, FP32, tmp_path / "again")
    assert line.startswith("import tests.export.tiny_eye; LlavaForConditionalGeneration.from_pretrained(")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert (processor.patch_size, processor.num_additional_image_tokens) == (8, 0)  # 24 px: 3 x 3 tokens


class _Gated(nn.Module):
    def __init__(self, vision_width: int, language_width: int):
        super().__init__()
        self.proj = nn.Linear(vision_width, language_width)

    def forward(self, features):
        return self.proj(features)


class _Plain(nn.Module):
    """A vision encoder of a user's own, without a model of transformers."""

    image_size, tokens_per_image, width = 16, 4, 32

    def forward(self, pixels):
        return pixels.new_zeros(len(pixels), 4, 32).float()


def _with(tokenizers, connector=LinearConnector, vision=None, tongue="llama") -> VisionLanguageModel:
    torch.manual_seed(0)
    language = tiny.language(tokenizers["llama_3"], tongue)
    return VisionLanguageModel(vision or tiny.vision("clip"), connector, language).eval()


class _Bright(VisionEncoder):
    def normalize(self, pixels_N3HW):
        return super().normalize(pixels_N3HW) + 1


REFUSED = {
    "own normalization": (
        lambda tok: _with(tok, vision=_Bright(tiny.vision("clip").settings)),
        "cannot normalize pixels as _Bright does, which has to be by its image_mean and image_std.",
    ),
    "connector": (
        lambda tok: _with(tok, partial(MLPConnector, MLPConnectorConfig(depth=3))),
        "cannot hold a MLPConnector of depth 3; it takes model/connector=linear, and model/connector=mlp2x_gelu.",
    ),
    "own connector": (lambda tok: _with(tok, _Gated), "cannot hold a _Gated; it takes"),
    "registers": (
        lambda tok: _with(tok, vision=tiny.vision("dinov2_registers")),
        "drops one token before the patches, but the tower dinov2_with_registers has 3",
    ),
    "own encoder": (
        lambda tok: _with(tok, vision=_Plain()),
        "transformers' classes cannot hold a _Plain; export takes a VisionEncoder, or a subclass, around one model",
    ),
    "tower": (
        lambda tok: _with(tok, vision=tiny.vision("blip2", features="cls_patch")),
        "LlavaForConditionalGeneration cannot hold a blip_2_vision_model.",
    ),
    "q-former": (
        lambda tok: VisionLanguageModel(
            tiny.vision("siglip"), LinearConnector, tiny.language(tok["gpt_2"]), tiny.qformer
        ),
        "cannot hold a Q-Former that reads a siglip_vision_model without the class token",
    ),
    "q-former's connector": (
        lambda tok: VisionLanguageModel(
            tiny.vision("blip2", features="cls_patch"), _Gated, tiny.language(tok["gpt_2"]), tiny.qformer
        ),
        "cannot hold a _Gated between Q-Former and language model; it takes model/connector=linear.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_classes_cannot_hold_is_refused(case, tokenizers, tmp_path):
    make, sentence = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        export_vision_language(make(tokenizers), Prompt("v1"), CROP, FP32, tmp_path)
    assert sentence in str(error.value) and "\n" not in str(error.value) and not any(tmp_path.iterdir())


def test_a_model_that_transformers_computes_otherwise_is_refused(tokenizers, tmp_path):
    """Granite divides its logits, which LlavaForConditionalGeneration does not do."""
    torch.manual_seed(0)
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    architecture = {"model_type": "granite", "logits_scaling": 8.0, **size}
    settings = LanguageModelConfig(init="random", architecture=architecture, tokenizer=str(tokenizers["llama_3"]))
    model = VisionLanguageModel(tiny.vision("clip"), LinearConnector, LanguageModel(settings)).eval()
    with pytest.raises(ConfigError, match=r"computes other logits than this run .* with a clip_vision_model and gran"):
        export_vision_language(model, Prompt("v1"), CROP, FP32, tmp_path)


BLOCKED = "import sys; sys.modules['mmlab'] = None; "
"""Begins a script in which mmlab cannot be imported."""

CLIENT = """
import base64, json, sys, openai
port, model, photo, question = sys.argv[1:]
client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
data = base64.b64encode(open(photo, "rb").read()).decode()
picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
asked = [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]
reply = client.chat.completions.create(model=model, messages=asked, max_tokens=8)
streamed = client.chat.completions.create(model=model, messages=asked, max_tokens=8, stream=True)
parts = [part.choices[0].delta.content or "" for part in streamed]
print(json.dumps([reply.choices[0].message.content, "".join(parts)]))
"""
"""Asks for an answer, whole and in parts. A process of its own: wandb reports when openai is imported in its own."""


def seer(tokenizer: Path) -> list[str]:
    small = "hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2"
    model = ["model/vision=siglip_tiny", f"model.vision.architecture={{{small}, image_size: 16}}"]
    model += [f"model.language.architecture={{{small}}}"]
    return ["experiment=llava/finetune_tiny", *model, f"model.language.tokenizer={tokenizer}", "data.aspect=pad"]


@pytest.fixture(scope="module")
def work(tmp_path_factory, tokenizer_folder) -> Path:
    """A finished run and its export, and a picture that has to be resized."""
    root = tmp_path_factory.mktemp("work")
    make_run(
        root / "runs", "seer", [*seer(tokenizer_folder), "stage.init_from=[]"], ["vision", "connector", "language"]
    )
    (root / "photo.png").write_bytes(png(photo(40, 30)))
    return root


def mmlab(work: Path, monkeypatch, capsys, *argv: str) -> tuple[int, str, str]:
    monkeypatch.chdir(work)
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    return code, out.strip(), err.strip()


@pytest.fixture
def exported(work, monkeypatch, capsys) -> tuple[Path, str]:
    """(the exported folder, the words of `mmlab chat`)."""
    out = work / "out"
    if not out.exists():
        code, line, err = mmlab(work, monkeypatch, capsys, "export", "run=seer", "out=out")
        assert (code, err.splitlines()) == (0, [PAD_NOTE])
        assert line == 'LlavaForConditionalGeneration.from_pretrained("out"), AutoProcessor.from_pretrained("out")'
    chat = [
        "chat",
        "run=seer",
        "image=photo.png",
        f"question='{QUESTION}'",
        "max_new_tokens=8",
        "trainer.accelerator=cpu",
    ]
    code, words, err = mmlab(work, monkeypatch, capsys, *chat, "trainer.accelerator=cpu")
    assert code == 0 and words, err
    return out, words


PAD_NOTE = (
    "WARNING: in transformers, pictures that are not square are padded with the color (127, 127, 127), "
    "not (122, 116, 104)."
)


def test_without_mmlab_a_pipeline_says_the_same_words(exported, work, tokenizers):
    """And the printed line is all that loads a user's own tower."""
    out, words = exported
    own, _ = export_vision_language(own_eye(tokenizers), Prompt("v1"), CROP, FP32, work / "own")
    register, _, load = own.rpartition("; ")
    script = BLOCKED + (
        "from transformers import AutoProcessor, LlavaForConditionalGeneration, pipeline; "
        "pipe = pipeline('image-text-to-text', model=sys.argv[1]); "
        "content = [{'type': 'image', 'url': sys.argv[2]}, {'type': 'text', 'text': sys.argv[3]}]; "
        "chat = [{'role': 'user', 'content': content}]; "
        "print(pipe(text=chat, return_full_text=False, max_new_tokens=8)[0]['generated_text'].strip()); "
        f"{register}; print(type(({load})[0].model.vision_tower).__name__)"
    )
    argv = [sys.executable, "-c", script, str(out), str(work / "photo.png"), QUESTION]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=work, env=environment)
    assert (done.returncode, done.stdout) == (0, f"{words}\nTinyEye\n"), done.stderr


def test_transformers_serves_the_folder_to_an_openai_client(exported, work):
    out, words = exported
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = BLOCKED + "from transformers.cli.transformers import main; main()"
    argv = [sys.executable, "-c", script, "serve", str(out), "--port", str(port), "--device", "cpu"]
    with (work / "serve.log").open("w") as log:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        server = subprocess.Popen(argv, stdout=log, stderr=log, cwd=work, env=environment)
    try:
        _wait(f"http://127.0.0.1:{port}/health", server, work / "serve.log")
        argv = [sys.executable, "-c", CLIENT, str(port), str(out), str(work / "photo.png"), QUESTION]
        replies = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        assert [reply.strip() for reply in json.loads(replies)] == [words, words]
    finally:
        server.kill()
        server.wait(30)


def _wait(url: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()
        try:
            if httpx.get(url).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def test_a_run_with_an_adapter_is_merged_or_not(work, tokenizer_folder, monkeypatch, capsys):
    monkeypatch.chdir(work)
    lora = ["+stage.lora={language: {rank: 2, alpha: 8}}", "stage.trainable=[language]", "stage.init_from=[seer]"]
    cfg = compose("train", [*seer(tokenizer_folder), *lora, "run.name=tuned"])
    stage = build_stage(cfg)
    with torch.no_grad():
        for weight in stage.model.parameters():
            weight.add_(torch.randn_like(weight) if weight.requires_grad else 0)
    folder = work / "runs" / "tuned"
    frozen = describe_frozen(stage.model, ["language"])
    save_parts(stage.model, ["language"], folder / "artifacts", {}, frozen, stage.bases)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    finish(folder, {"steps": 1})
    weights = []
    for merge, line in {
        "true": 'LlavaForConditionalGeneration.from_pretrained("to_true"), ',
        "false": 'PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained("to_false"), "to_false/ad',
    }.items():
        code, out, err = mmlab(work, monkeypatch, capsys, "export", "run=tuned", f"out=to_{merge}", f"merge={merge}")
        assert code == 0 and out.startswith(line), err
        weights.append(load_file(work / f"to_{merge}" / "model.safetensors"))
    names = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert len(names) == 14 and all(name.endswith("proj.weight") for name in names)  # 7 linear layers in each of two


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["to=diffusers"], "runs/seer cannot be exported to diffusers; set to=transformers."),
        (["merge=false"], "runs/seer has no adapter that merge=false could keep apart; leave merge out."),
        (["steps=4"], "steps applies only to generative models; runs/seer writes text."),
        (["sampler=ddim"], "sampler applies only to generative models; runs/seer writes text."),
    ],
)
def test_a_mistake_is_one_sentence(work, monkeypatch, capsys, argv, says):
    code, _, err = mmlab(work, monkeypatch, capsys, "export", "run=seer", "out=new", *argv)
    assert (code, err) == (2, f"mmlab: {says}") and not (work / "new").exists()
