"""LLaVA's layouts give the same logits and words here as in transformers; what cannot be converted is one sentence."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Dinov2Config,
    GPT2Config,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    SiglipVisionConfig,
)

from mmlab import cli
from mmlab.config.errors import ConfigError
from mmlab.data.collate import check_room
from mmlab.data.packing import Shown, place_pictures
from mmlab.data.sample_types import ImageSpec
from mmlab.evaluate.answers import Answerer
from mmlab.model.llava_layouts import read_llava
from mmlab.runs.run import load_run_config
from mmlab.stage.assembly import restore, run_prompt
from mmlab.stage.estimate import estimate
from mmlab.verbs._llava_prompt import prompt_of
from mmlab.weights import content_hash, verify_files
from tests.export.tiny_chats import photo, png
from tests.model import tiny_llava as tiny
from tests.tiny_pictures import placed, square

PLACES = (tiny.SIDE // tiny.PATCH) ** 2
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


NAMES = ("port", "new_names", "own", "own_tower", "linear_port", "linear")
NEXT = ("next_port", "next_own")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A checkpoint of each layout, all of one model, and the runs that they become."""
    root = tmp_path_factory.mktemp("llava")
    model, linear = tiny.tiny_model(), tiny.tiny_model("linear")
    second = linear.model.multi_modal_projector.linear_2
    second.weight.data, second.bias.data = torch.eye(len(second.weight)), torch.zeros_like(second.bias)
    eye, base = tiny.tower(root / "eye", model), tiny.base(root / "base", model)
    tiny.port(root / "port", model)
    tiny.port(root / "new_names", model, "new")
    tiny.port(root / "linear_port", linear)
    tiny.own(root / "own", model, eye)
    tiny.own(root / "own_tower", model, "somewhere/clip", with_tower=True)
    tiny.own(root / "linear", linear, eye)
    tiny.lora(root / "lora", model, eye, base)
    tiny.projector(root / "projector", model, eye, base)
    tiny.next_port(root / "next_port", (following := tiny.tiny_next()))
    tiny.own(root / "next_own", following, tiny.tower(root / "next_eye", following), **tiny.TILED)
    options = {"own_tower": ["--vision", str(eye)], "merged": ["--base", str(base)]}
    for name in (*NAMES, "lora", "merged", "projector", *NEXT):
        source = root / ("lora" if name == "merged" else name)
        assert cli.main(["convert", "llava", str(source), str(root / "runs" / name), *options.get(name, [])]) == 0
    return root


def compare(run: Path, reference: Any) -> None:
    """Compare the logits of a prompt with a picture, and the words that follow it."""
    model, cfg = restore(run)
    answerer = Answerer(model, run_prompt(cfg), cfg.data, max_new_tokens=12)
    drawn = torch.Generator().manual_seed(0)
    for question in ("What is in the picture?", "A red square"):
        picture = torch.randint(256, (3, tiny.SIDE, tiny.SIDE), generator=drawn, dtype=torch.uint8)
        shown = [square(picture, PLACES)]
        segment = answerer.tokens(answerer.ask(question, 1), shown)
        ids, start = torch.tensor([segment.input_ids]), segment.image_starts[0]
        theirs = ids.clone()
        theirs[0, start : start + PLACES] = tiny.IMAGE_TOKEN
        inputs = {"input_ids": theirs, "pixel_values": ((picture / 255 - MEAN) / STD)[None]}
        inputs["attention_mask"] = torch.ones_like(ids)
        with torch.no_grad():
            embeds = model.embed(ids, model.features(picture[None]), *placed([(0, start)], PLACES).values())
            logits = model.language.causal(inputs_embeds=embeds).logits
            torch.testing.assert_close(logits, reference(**inputs).logits[..., : tiny.TOKENS], atol=1e-5, rtol=1e-5)
            words = reference.generate(**inputs, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        words = model.language.tokenizer.decode(words, skip_special_tokens=True).strip()
        assert answerer.complete([segment], [shown])[0][0] == words and words


@pytest.mark.parametrize("name", NAMES)
def test_it_computes_what_transformers_does(work, name):
    port = work / ("linear_port" if "linear" in name else "port")
    reference = LlavaForConditionalGeneration.from_pretrained(port, dtype=torch.float32).eval()
    compare(work / "runs" / name, reference)


@torch.no_grad()
@pytest.mark.parametrize("name", NEXT)
def test_pictures_in_tiles(work, name):
    """LLaVA-NeXT, with two pictures in one question."""
    reference: Any = LlavaNextForConditionalGeneration.from_pretrained(work / "next_port", dtype=torch.float32).eval()
    model, cfg = restore(work / "runs" / name)
    assert cfg.data.aspect == "anyres" and cfg.data.grids == [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
    assert cfg.stage.prompt.template == "mistral"
    answerer = Answerer(model, run_prompt(cfg), cfg.data, max_new_tokens=12)
    shown = answerer.decode([png(photo(90, 40)), png(photo(33, 64))])
    segment = answerer.tokens(answerer.ask("Is the red square in both?", 2), shown)
    placed = [Shown(*one) for one in zip(shown, [0, 0], segment.image_starts, strict=True)]
    batch, ids = place_pictures(placed, PLACES, tiny.SIDE), torch.tensor([segment.input_ids])
    places, pixels = (batch["image_positions"], batch["image_features"]), batch["pixel_values"]
    theirs = ids.clone()
    theirs[0, places[0][:, 1]] = tiny.IMAGE_TOKEN
    inputs = {"input_ids": theirs, "pixel_values": (pixels / 255 - MEAN) / STD, "attention_mask": torch.ones_like(ids)}
    inputs["image_sizes"] = torch.tensor([[40, 90], [64, 33]])
    logits = model.language.causal(inputs_embeds=model.embed(ids, model.features(pixels), *places)).logits
    torch.testing.assert_close(logits, reference(**inputs).logits[..., : tiny.TOKENS], atol=1e-5, rtol=1e-5)
    words = reference.generate(**inputs, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    words = model.language.tokenizer.decode(words, skip_special_tokens=True).strip()
    assert answerer.complete([segment], [shown])[0][0] == words and words


@pytest.mark.parametrize("name", NEXT)
def test_a_run_with_tiles_can_be_planned(work, name):
    cfg = load_run_config(work / "runs" / name)
    tower = ["vision"] if name == "next_port" else []
    assert cfg.stage.trainable == [*tower, "connector", "newline", "language"]
    assert estimate(cfg).counts["newline"] == {"trainable": tiny.TEXT["hidden_size"], "frozen": 0}
    check_room(ImageSpec(336, "anyres", 576, tuple(map(tuple, cfg.data.grids))), cfg.data)  # of the published size


@pytest.mark.parametrize("name", ["lora", "merged"])
def test_a_lora_adds_what_peft_adds(work, name):
    reference = LlavaForConditionalGeneration.from_pretrained(work / "port", dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, work / "lora").merge_and_unload()
    if name == "merged":  # written in the dtype of the base
        peft = peft.half().float()
    state = reference.state_dict()
    for key, value in peft.state_dict().items():
        ours = key.replace("model.", "model.language_model.", 1) if key != "lm_head.weight" else key
        state[ours][: len(value)] = value
    reference.load_state_dict(state)
    compare(work / "runs" / name, reference)


def test_the_folder_is_that_of_a_complete_run(work):
    for name, parts in {
        "port": "connector language vision",
        "own": "connector language",
        "lora": "connector language",
    }.items():
        run = work / "runs" / name
        assert {path.name for path in (run / "artifacts").iterdir()} == set(parts.split())
        for file in ("config.yaml", "done.json", "identity.json", "code.json", "overrides.txt"):
            assert (run / file).is_file(), file
        model = restore(run)[0]
        for part in parts.split():
            verify_files(run / "artifacts" / part)
            card = json.loads((run / "artifacts" / part / "card.json").read_text())
            assert card["converted_from"] == str(work / name)
            if name != "lora":
                assert card["content_hash"] == content_hash(model.get_submodule(part)), part
    facts = json.loads((work / "runs" / "port" / "artifacts" / "connector" / "card.json").read_text())["against"][
        "vision"
    ]
    assert facts["feature_layer"] == -2 and len(facts["content_hash"]) == 64


def test_weights_stay_in_their_dtype_and_the_port_loses_its_rows(work):
    with safe_open(work / "runs" / "port" / "artifacts" / "language" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.offset_keys()} == {"F16"}
        assert file.get_slice("lm_head.weight").get_shape()[0] == tiny.TOKENS
    tokenizers = [restore(work / "runs" / name)[0].language.tokenizer for name in ("port", "own")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab() and len(tokenizers[0]) == tiny.TOKENS
    assert tokenizers[0].all_special_ids == tokenizers[1].all_special_ids


def test_prompt_and_aspect(work, tmp_path):
    asked = {}
    for name in ("port", "own", "linear", "projector", "lora"):
        cfg = restore(work / "runs" / name)[1]
        asked[name] = (cfg.stage.prompt.template, cfg.stage.prompt.system, cfg.data.aspect)
    assert asked == {
        "port": ("v1", "", "crop"),  # as its chat template and its image processor have it
        "own": ("v1", None, "pad"),
        "linear": ("v0", None, "pad"),
        "projector": ("plain", None, "crop"),
        "lora": ("v1", None, "pad"),
    }
    mistral = changed(work / "own", tmp_path / "mistral", architectures=["LlavaMistralForCausalLM"])
    assert prompt_of(read_llava(mistral), None, None) == ({"template": "v1"}, False)  # that of tiles alone is Mistral's


def test_a_renamed_run_still_finds_its_parts(work, tmp_path):
    run = shutil.copytree(work / "runs" / "port", tmp_path / "elsewhere" / "other")
    (work / "runs" / "port").rename(work / "gone")
    try:
        model, cfg = restore(run)
    finally:
        (work / "gone").rename(work / "runs" / "port")
    assert cfg.model.language.source == str(run / "artifacts" / "language") and model.language.vocabulary == tiny.TOKENS


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
OTHERS: dict[str, Any] = {
    # A class token, which is kept; tied embeddings, of which the checkpoint has one.
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}, CLIPVisionConfig, "full", "cls_patch"),
    # No class token, so there is nothing to leave out.
    "mistral": (MistralConfig, {}, SiglipVisionConfig, "full", "patch"),
    # Saved under older names than those in memory.
    "phi3": (Phi3Config, {"pad_token_id": 0}, Dinov2Config, "default", "patch"),
    # The names of its biases end as those of buffers in older checkpoints.
    "gpt2": (
        GPT2Config,
        {"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2},
        CLIPVisionConfig,
        "default",
        "patch",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families(tmp_path, name):
    language, more, tower, strategy, features = OTHERS[name]
    text = language(**tiny.TEXT, vocab_size=tiny.PADDED, initializer_range=0.2, **more)
    fields = {"vision_feature_select_strategy": strategy, "tie_word_embeddings": text.tie_word_embeddings}
    fields |= {"vision_feature_layer": -1} if tower is Dinov2Config else {}
    reference = tiny.saved_port(tmp_path / "it", text, tower(**SMALL), **fields)
    assert cli.main(["convert", "llava", str(tmp_path / "it"), str(tmp_path / "run")]) == 0
    model, cfg = restore(tmp_path / "run")
    assert cfg.model.vision.features == features and model.language.vocabulary == tiny.TOKENS
    drawn = torch.Generator().manual_seed(0)
    picture = torch.randint(256, (1, 3, tiny.SIDE, tiny.SIDE), generator=drawn, dtype=torch.uint8)
    image = torch.full((1, model.tokens_per_image), tiny.IMAGE_TOKEN)
    ids = torch.cat([torch.tensor([[1, 300]]), image, torch.tensor([[310, 311]])], 1)
    with torch.no_grad():
        pixels = (picture - model.vision.mean) / model.vision.std
        logits = reference(input_ids=ids, pixel_values=pixels).logits[..., : tiny.TOKENS]
        places = placed([(0, 2)], model.tokens_per_image).values()
        embeds = model.embed(ids.clamp(max=tiny.TOKENS - 1), model.features(picture), *places)
        torch.testing.assert_close(model.language.causal(inputs_embeds=embeds).logits, logits, atol=1e-5, rtol=1e-5)


def test_what_the_own_config_says_about_the_tower(work, tmp_path):
    fields = {"mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch", "image_aspect_ratio": "square"}
    checkpoint = read_llava(changed(work / "own", tmp_path / "it", **fields))
    assert (checkpoint.feature_layer, checkpoint.features, checkpoint.aspect) == (-1, "cls_patch", "crop")
    assert checkpoint.vision_source == str(work / "eye")


def test_a_token_that_is_no_patch(tmp_path, capsys):
    text = MistralConfig(**tiny.TEXT, vocab_size=tiny.PADDED)
    tiny.saved_port(tmp_path / "it", text, SiglipVisionConfig(**SMALL))
    assert cli.main(["convert", "llava", str(tmp_path / "it"), str(tmp_path / "run")]) == 2
    assert "leaves out 1 of the tokens of a tower that has 0 before its patches" in capsys.readouterr().err


def changed(folder: Path, out: Path, **fields) -> Path:
    """A copy with other fields in its config."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **fields}))
    return out


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        (
            "next_own",
            {"image_aspect_ratio": "anyres_max_9"},
            "has image_aspect_ratio=anyres_max_9 with mm_patch_merge_type=spatial_unpad; of pictures in tiles, anyres",
        ),
        ("next_own", {"mm_patch_merge_type": "spatial"}, "anyres with mm_patch_merge_type=spatial; of pictures"),
        ("next_own", {"image_aspect_ratio": "pad"}, "image_aspect_ratio=pad with mm_patch_merge_type=spatial_unpad;"),
        (
            "next_own",
            {"image_grid_pinpoints": "(1x1),...,(6x6)"},
            r"image_grid_pinpoints=\(1x1\),...,\(6x6\); pairs of",
        ),
        ("next_port", {"image_grid_pinpoints": [[32, 48]]}, "has a grid of 32 x 48 pixels; grids of whole tiles of 32"),
        ("port", {"model_type": "llava_next", "image_grid_pinpoints": [[32, 64]]}, "has no weights of the newline"),
        ("own", {**tiny.TILED}, "has no weights of the newline"),
        (
            "projector",
            {**tiny.TILED},
            "a projector alone lacks the newline that ends their rows; convert the whole",
        ),
        ("own", {"mm_use_im_start_end": True}, "has images between <im_start> and <im_end>"),
        ("own", {"mm_resampler_type": "perceiver"}, r"has a resampler \(perceiver\)"),
        ("own", {"mm_projector_type": "mlp2x_res"}, "a projector of the type 'mlp2x_res'"),
        ("own", {"quantization_config": {"bits": 4}}, "has quantized weights"),
        (
            "own",
            {"architectures": ["LlavaLlamoForCausalLM"]},
            r"no causal language model 'llamo'\. Did you mean 'llama'\?",
        ),
        ("own", {"architectures": ["LlavaMistralForCausalLM"], "head_dim": 7}, "does not fit|should be"),
        ("port", {"model_type": "vipllava"}, r"is a vipllava; of transformers' models, `llava` .* and `llava_next`"),
        ("port", {"vision_feature_layer": [-2, -5]}, r"at the layers \[-2, -5\]"),
        ("port", {"projector_hidden_act": "relu"}, "the activation 'relu'"),
        ("base", {}, "is a llama, not a LLaVA checkpoint; name its folder as model.language.source"),
        ("eye", {}, "is a clip_vision_model, not a LLaVA checkpoint; name its folder as model.vision.source"),
    ],
)
def test_what_cannot_be_converted(work, tmp_path, capsys, name, fields, sentence):
    folder = changed(work / name, tmp_path / "it", **fields)
    assert cli.main(["convert", "llava", str(folder), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error), error
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".draft*"))


def test_what_is_not_complete(work, tmp_path):
    folder = shutil.copytree(work / "own", tmp_path / "own")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ConfigError, match=r"pytorch_model-00002-of-00002\.bin, which is missing"):
        read_llava(folder)
    folder = shutil.copytree(work / "lora", tmp_path / "lora")
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(ConfigError, match=r"is not complete: it has no non_lora_trainables\.bin"):
        read_llava(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"not a LLaVA checkpoint: it has no config\.json; it contains nothing"):
        read_llava(tmp_path / "empty")


@pytest.mark.parametrize("file", ["generation_config.json", "chat_template.json", "preprocessor_config.json"])
def test_a_damaged_file_is_named(work, tmp_path, capsys, file):
    folder = shutil.copytree(work / "port", tmp_path / "it")
    (folder / file).write_text('{"chat')
    assert cli.main(["convert", "llava", str(folder), str(tmp_path / "out")]) == 2
    assert f"{folder / file} cannot be read" in capsys.readouterr().err


def test_a_delta_is_refused(work, tmp_path):
    folder = shutil.copytree(work / "own", tmp_path / "delta")
    for path in folder.glob("*.bin"):
        torch.save({name: value * 0.001 for name, value in torch.load(path).items()}, path)
    with pytest.raises(ConfigError, match=r"holds the differences to its base model"):
        read_llava(folder)


def test_adapters_of_other_kinds(work, tmp_path):
    for change, reason in (
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias=all"),
        ({"peft_type": "IA3"}, "peft_type=IA3"),
    ):
        folder = shutil.copytree(work / "lora", tmp_path / reason)
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(ConfigError, match=f"is an adapter with {reason}"):
            read_llava(folder)


def test_minigpt4(tmp_path, capsys):
    weights = {"llama_proj.weight": torch.zeros(4096, 768).half(), "llama_proj.bias": torch.ones(4096).half()}
    torch.save({"model": weights, "optimizer": {"state": {}}, "epoch": 3, "config": Path}, tmp_path / "minigpt4.pth")
    assert cli.main(["convert", "llava", str(tmp_path / "minigpt4.pth"), str(tmp_path / "run")]) == 0
    assert "prompt: minigpt4" in capsys.readouterr().out
    with safe_open(tmp_path / "run" / "artifacts" / "connector" / "model.safetensors", "pt") as file:
        assert set(file.offset_keys()) == {"proj.weight", "proj.bias"} and file.get_tensor("proj.bias").sum() == 4096
    torch.save({"model": {"llama_proj.weight": torch.zeros(4096, 5632)}}, tmp_path / "llama2.pth")
    assert cli.main(["convert", "llava", str(tmp_path / "llama2.pth"), str(tmp_path / "other")]) == 2
    assert "projects 5632 values to 4096" in capsys.readouterr().err
