"""A vision encoder of a user's own package, through every verb of a vision-language model."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from mmlab import cli
from mmlab.stage.assembly import restore
from mmlab.weights import content_hash
from tests.tiny_shapes import make_shapes

PLAIN = """
import torch
from safetensors.torch import load_file, save_file
from torch import nn


class Eye(nn.Module):
    image_size, width = 32, 12

    def __init__(self, weights=None, patch=8, promised=16):
        super().__init__()
        self.weights, self.tokens_per_image = weights, promised
        self.conv = nn.Conv2d(3, self.width, patch, patch)
        self.norm = nn.BatchNorm2d(self.width)

    def forward(self, pixels):
        return self.norm(self.conv(pixels.to(self.conv.weight.dtype) / 255 - 0.5)).flatten(2).transpose(1, 2)


class Trained(Eye):
    def load_pretrained(self):
        self.load_state_dict(load_file(self.weights))


class Formless(nn.Module):
    def __init__(self, weights=None):
        super().__init__()
        self.image_size, self.width = 32, 12


torch.manual_seed(0)
eye = Eye()
nn.init.uniform_(eye.norm.running_mean)
STATE = {name: value.clone() for name, value in eye.state_dict().items()}
"""
REGISTERED = """
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from mmlab.model.vision import VisionEncoder


class EyeConfig(PretrainedConfig):
    model_type = "mylab_eye"
    channels: int = 12
    image_size: int = 32


class EyeModel(PreTrainedModel):
    config_class, main_input_name = EyeConfig, "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.conv = nn.Conv2d(3, config.channels, 8, 8)
        self.head = nn.Linear(config.channels, 5)
        self.post_init()

    def forward(self, pixel_values, **options):
        return BaseModelOutput(last_hidden_state=self.conv(pixel_values))


AutoConfig.register("mylab_eye", EyeConfig)
AutoModel.register(EyeConfig, EyeModel)


class Eye(VisionEncoder):
    pass
"""
PAGE = """
_target_: mylab.plain.Trained
weights: eye.safetensors
patch: 8
promised: 16
"""
SMALL = "hidden_size:32,intermediate_size:48,num_hidden_layers:2,num_attention_heads:2"
COMMON = [
    "data.root=.",
    "data.global_batch=4",
    "data.micro_batch=2",
    "data.workers=0",
    "data.max_length=200",
    "trainer=cpu",
    "logger=none",
    "callbacks.samples=null",
    f"model.language.architecture={{{SMALL}}}",
    "model.language.tokenizer=tokenizer",
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A user's folder: the package mylab, a page for its encoder, weights, shards and a picture."""
    folder = make_shapes(tmp_path_factory.mktemp("work"), train=8, val=4, size=32)
    (folder / "mylab").mkdir()
    for name, text in {"__init__": "", "plain": PLAIN, "registered": REGISTERED}.items():
        (folder / "mylab" / f"{name}.py").write_text(text)
    (folder / "conf" / "model" / "vision").mkdir(parents=True)
    (folder / "conf" / "model" / "vision" / "eye.yaml").write_text(PAGE)
    Image.new("RGB", (50, 40), "red").save(folder / "photo.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("MMLAB_ALLOW_TARGETS", "mylab")
        from mylab import plain  # type: ignore[import-not-found]

        plain.save_file(plain.STATE, folder / "eye.safetensors")
        yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "mylab"]:
        del sys.modules[name]


@pytest.fixture
def mmlab(work, monkeypatch, capsys):
    monkeypatch.chdir(work)

    def run(*argv: str, code: int = 0) -> str:
        assert cli.main(list(argv)) == code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return out + err

    return run


def train(mmlab, recipe: str, name: str, *overrides: str, steps: int = 2, code: int = 0) -> str:
    length = [f"trainer.max_steps={steps}", f"run.name={name}"]
    return mmlab("train", f"experiment=llava/{recipe}", *COMMON, *length, *overrides, code=code)


def test_a_plain_module_through_all_verbs(mmlab, work):
    from mylab import plain  # type: ignore[import-not-found]

    mine = ["model/vision=eye", "stage.init_from=[]"]
    cache = "stage.feature_cache_mb=8"
    out = train(mmlab, "align_tiny", "mine", *mine, cache)
    assert "'vision' is frozen with the random weights" not in out, "load_pretrained filled it"
    train(mmlab, "align_tiny", "mine", *mine, cache, steps=4)
    train(mmlab, "align_tiny", "straight", *mine, "stage.feature_cache_mb=0", steps=4)
    resumed, straight = (restore(Path("runs", name))[0] for name in ("mine", "straight"))
    assert content_hash(resumed.connector) == content_hash(straight.connector)
    assert all(value.equal(plain.STATE[name]) for name, value in resumed.vision.state_dict().items())
    tuned = ["model/vision=eye", "stage.init_from=[mine]", "stage.trainable=[vision,connector,language]"]
    train(mmlab, "finetune_tiny", "tuned", *tuned)
    after = restore(Path("runs/tuned"))[0].vision.state_dict()
    assert not after["conv.weight"].equal(plain.STATE["conv.weight"]), "its own artifact was loaded"
    card = json.loads(Path("runs/tuned/artifacts/vision/card.json").read_text())
    assert card["class"] == "Trained" and set(card["shapes"]) == set(plain.STATE)
    mmlab("eval", "run=tuned", "data.path=val", "limit=2", "max_new_tokens=2", "trainer.accelerator=cpu")
    mmlab("chat", "run=tuned", "image=photo.png", "question=what?", "max_new_tokens=2", "trainer.accelerator=cpu")
    counts = mmlab("plan", "experiment=llava/align_tiny", *COMMON, *mine)
    assert f"{'vision':<14}{0:>16,}{8 * 8 * 3 * 12 + 12 + 2 * 12:>16,}" in counts


def test_random_weights_of_a_plain_module_are_kept(mmlab):
    out = train(mmlab, "align_tiny", "random", "model/vision=eye", "model.vision._target_=mylab.plain.Eye",
                "stage.init_from=[]")  # fmt: skip
    assert "'vision' is frozen with the random weights" in out
    assert Path("runs/random/artifacts/vision/model.safetensors").is_file()


def test_a_registered_tower_is_read_as_one_of_transformers(mmlab, work):
    page = ["model/vision=pretrained", "model.vision._target_=mylab.registered.Eye", "model.vision.init=random"]
    page += ["+model.vision.architecture={model_type:mylab_eye,channels:8}", "stage.init_from=[]"]
    train(mmlab, "align_tiny", "registered", *page)
    model, _ = restore(Path("runs/registered"))
    assert (model.vision.width, model.vision.tokens_per_image, model.vision.feature_layer) == (8, 16, -1)
    assert {name for name, weight in model.vision.tower.named_parameters() if weight in {*model.vision.unused()}} == {
        "head.weight",
        "head.bias",
    }
    source = ["model.vision.source=runs/registered/artifacts/vision", "model.vision.init=pretrained"]
    out = train(mmlab, "align_tiny", "again", *page, *source)
    assert "frozen with the random weights" not in out.replace("'language' is frozen with the random weights", "")
    again = restore(Path("runs/again"))[0]
    assert again.vision.tower.conv.weight.equal(model.vision.tower.conv.weight)


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["model.vision.promised=9"], "states tokens_per_image=9 and width=12, but its features of 2 images are"),
        (["model.vision._target_=mylab.plain.Formless", "~model.vision.patch", "~model.vision.promised"],
         "Formless is not a vision encoder, because it has no tokens_per_image"),
        (["model.vision._target_=mylab.plain.Eyes"], "has no class 'Eyes'. Did you mean 'Eye'?"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_encoder_is_one_sentence(mmlab, overrides, sentence):
    out = train(
        mmlab, "align_tiny", f"wrong-{len(sentence)}", "model/vision=eye", "stage.init_from=[]", *overrides, code=2
    )
    assert sentence in out
