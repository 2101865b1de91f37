"""The experiment real_parts with small stand-ins: its encoder, the rule for right answers, the records."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from mmlab import cli
from mmlab.config.compose import compose
from tests.tiny_shapes import make_shapes

FOLDER = Path(__file__).parents[1] / "experiments" / "real_parts"
NAMES = ("groceries", "texts", "prepare", "figures", "efficientnet_lite", "lite_encoder")


@pytest.fixture
def parts(monkeypatch):
    """The experiment's modules by name; other experiments have modules of the same names."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


def small(lite):
    return lite.EfficientNetLiteConfig(stages=((1, 3, 1, 1, 4), (2, 5, 2, 2, 6)), stem=4, hidden_size=8, image_size=64)


def test_the_encoder_gives_normalized_tokens_of_a_grid(parts):
    lite = parts["efficientnet_lite"]
    tower = lite.EfficientNetLite(small(lite)).eval()
    out = tower(torch.randn(2, 3, 64, 64))
    tokens = out.last_hidden_state
    assert tokens.shape == (2, 5, 8) and out.pooler_output.shape == (2, 8)
    assert tower.features(torch.randn(1, 3, 64, 64)).shape == (1, 8, 16, 16)
    assert torch.allclose(tokens.mean(-1), torch.zeros(2, 5), atol=1e-5)


def test_the_published_network_has_its_shapes(parts):
    lite = parts["efficientnet_lite"]
    with torch.device("meta"):
        tower = lite.EfficientNetLite(lite.EfficientNetLiteConfig())
        assert tower.features(torch.empty(1, 3, 224, 224)).shape == (1, 1280, 7, 7)
    # Tan and Le, table 1: 16 layers; Lite0 has 4,652,008 weights with its last layer of 1,281,000.
    assert len(tower.blocks) == 16 and sum(p.numel() for p in tower.parameters()) == 4_652_008 - 1_281_000


@pytest.mark.parametrize(("size", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (9, 5, 2), (8, 5, 1)])
def test_padding_is_that_of_tensorflow(parts, size, kernel, stride):
    convolution = parts["efficientnet_lite"].SameConv2d(1, 1, kernel, stride, bias=False)
    with torch.no_grad():
        convolution.weight.fill_(1.0)
    out = convolution(torch.ones(1, 1, size, size))[0, 0]
    assert out.shape == (-(-size // stride),) * 2
    # A window of ones sums up what is not padding: "SAME" puts the odd row and column behind.
    before = max((-(-size // stride) - 1) * stride + kernel - size, 0) // 2
    assert out[0, 0] == (kernel - before) ** 2


def test_a_checkpoint_of_the_package_fills_the_tower(parts):
    lite = parts["efficientnet_lite"]
    tower = lite.EfficientNetLite(small(lite))
    named = {"_" + name.replace(".bn", "._bn").replace("s.0.", "s.0._"): v for name, v in tower.state_dict().items()}
    weights, last = lite.weights_of({**named, "_fc.weight": torch.ones(2, 8), "_fc.bias": torch.ones(2)})
    assert set(last) == {"weight", "bias"}
    tower.load_state_dict(weights)


def test_a_text_is_right_if_it_names_one_class(parts):
    groceries = parts["groceries"]
    photos = [
        groceries.Photo(path, fine, coarse)
        for path, fine, coarse in (
            ("train/Fruit/Apple/x.jpg", "Granny-Smith", "Apple"),
            ("train/Fruit/Orange/x.jpg", "Orange", "Orange"),
            ("train/Fruit/Pineapple/x.jpg", "Pineapple", "Pineapple"),
            ("train/Fruit/Melon/x.jpg", "Watermelon", "Melon"),
            ("train/Vegetables/Pepper/x.jpg", "Orange-Bell-Pepper", "Pepper"),
            ("train/Vegetables/Carrots/x.jpg", "Carrots", "Carrots"),
            ("train/Fruit/Satsumas/x.jpg", "Satsumas", "Satsumas"),
        )
    ]
    names = groceries.lexicon(photos)
    assert [photo.what for photo in photos] == [
        "an apple, a Granny Smith apple",
        "an orange",
        "a pineapple",
        "a melon, a watermelon",
        "a pepper, an orange bell pepper",
        "a carrot",
        "a satsuma",
    ]
    assert photos[0].kind == "fruit" and photos[4].kind == "vegetable"
    for photo in photos:
        assert groceries.is_right(f"A photo of {photo.what}.", photo.coarse, names), photo
    assert groceries.named("A bag of Granny-Smith apples", names) == {"Apple"}
    assert groceries.named("an orange bell pepper", names) == {"Pepper"}
    assert groceries.named("oranges and peppers", names) == {"Orange", "Pepper"}
    assert groceries.named("a pineapple", names) == {"Pineapple"}
    assert not groceries.is_right("an apple or an orange", "Apple", names)
    assert not groceries.is_right("a photo of fruit", "Apple", names)


def test_the_questions_compared_are_those_answered_rightly_before(parts):
    texts = parts["texts"]
    assert not {*texts.prompts()} & {*texts.QUESTIONS} and len({*texts.prompts()}) == len(texts.prompts())
    first, second, third = list(texts.QUESTIONS)[:3]
    before = {first: "It is Paris.", second: "It is Venice.", third: "Tokyo"}
    assert texts.chosen(before) == [first, third] and texts.chosen(before, 1) == [first]


def test_records_are_made_from_photos_and_questions(parts):
    prepare, photo = parts["prepare"], parts["groceries"].Photo("val/Fruit/Lemon/1.jpg", "Lemon", "Lemon")
    entries = prepare.dialogues(photo)
    assert [len(entry["conversations"]) for entry in entries] == [4, 4, 4]
    assert entries[0]["conversations"][0]["value"] == "<image>\nWhat is this?"
    assert entries[0]["conversations"][1]["value"] == "A photo of a lemon."
    assert entries[0]["conversations"][3]["value"] == "It is a fruit."
    questions = [[f"is it {n}?", "no", n // 7] for n in range(14)]
    easy = prepare.easy_dialogues(questions)
    assert [len(entry["conversations"]) for entry in easy] == [10, 4, 10, 4]
    asked = [turn["value"] for entry in easy for turn in entry["conversations"][::2]]
    assert {text.removeprefix("<image>\n") for text in asked} == {text for text, *_ in questions}


def test_answers_that_were_cut_off_end_with_a_sentence(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [("Tell me.", "One. Two. And th"), ("Why?", "Because"), ("What?", "This.")]
    predictions = [json.dumps({"question": question, "prediction": answer}) for question, answer in lines]
    (tmp_path / "predictions.jsonl").write_text("\n".join(predictions))
    parts["prepare"].own_answers(tmp_path / "predictions.jsonl")
    entries = json.loads((tmp_path / "json/text_dialogues.json").read_text())
    assert [entry["conversations"][1]["value"] for entry in entries] == ["One. Two.", "This."]
    assert all("image" not in entry for entry in entries)


@pytest.mark.parametrize("recipe", ["align", "lora", "full"])
def test_a_recipe_trains_with_small_parts(parts, tmp_path, monkeypatch, capsys, recipe):
    """Two steps with a small tower of the experiment's own class and the tiny language model."""
    monkeypatch.setenv("MMLAB_ALLOW_TARGETS", "lite_encoder")
    monkeypatch.chdir(tmp_path)
    lite = parts["efficientnet_lite"]
    tower = lite.EfficientNetLite(small(lite))
    tower.save_pretrained("tower")
    (tmp_path / "tower/preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [1] * 3})
    )
    shapes = make_shapes(tmp_path, train=6, val=2, size=64)
    small_parts = ["model/language=llama_tiny", "model.vision.source=tower", "data.workers=0"]
    small_parts += ["data.train=[{path: train}]", "data.val=[{path: val}]", f"data.root={shapes}", "logger=none"]
    small_parts += ["data.global_batch=4", "data.micro_batch=4", "stage.prompt={template: v1, system: null}"]
    small_parts += ["model.language.architecture={hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2}"]
    command = ["train", "--config-dir", str(FOLDER / "conf"), *small_parts, "trainer.max_steps=2"]
    assert cli.main([*command, "experiment=real_parts/align", "run.name=real_parts/align"]) == 0
    if recipe == "align":
        artifacts = tmp_path / "runs/real_parts/align/artifacts"
        assert (artifacts / "connector/card.json").is_file() and not (artifacts / "vision").exists()
        return
    code = cli.main([*command, f"experiment=real_parts/{recipe}", "run.name=it", "model.language.init=random"])
    assert code == 0, capsys.readouterr().err
    language = tmp_path / "runs/it/artifacts/language"
    assert (language / "adapter_config.json").is_file() == (recipe == "lora")


def test_the_recipes_name_the_parts_from_outside(monkeypatch):
    monkeypatch.chdir(FOLDER)  # for its conf/
    for recipe in ("align", "lora", "full"):
        cfg = compose("train", [f"experiment=real_parts/{recipe}"])
        assert cfg.model.vision._target_ == "lite_encoder.Encoder" and cfg.model.language.source.endswith(".gguf")
        assert set(cfg.stage.lora) == ({"language"} if recipe == "lora" else set())
        assert cfg.stage.feature_cache_mb > 0 and cfg.stage.prompt.template == "tokenizer"
