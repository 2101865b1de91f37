"""What a run leaves behind fits the next one, or is refused with a reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Blip2VisionModel

from mmlab.config.errors import ConfigError, RunError
from mmlab.model.config import LanguageModelConfig, VisionEncoderConfig
from mmlab.model.language import LanguageModel
from mmlab.model.vision import VisionEncoder
from mmlab.runs.disk import DRAFT
from mmlab.training.artifacts import content_hashes, describe, describe_frozen, save_parts, write_card
from mmlab.training.filling import fill_parts
from mmlab.weights import CARD, content_hash, note_identity
from tests.model import tiny

EVERY = ["vision", "connector", "language"]
PIXELS = torch.arange(2 * 3 * 16 * 16).remainder(251).to(torch.uint8).view(2, 3, 16, 16)


def different(model: nn.Module) -> Any:
    """The same shapes with other weights."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def save(model: nn.Module, parts: list[str], run: Path) -> Path:
    save_parts(model, parts, run / "artifacts", {"run": run.name}, describe_frozen(model, parts))
    return run


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("eye", tiny.VISION)
@pytest.mark.parametrize("tongue", ["llama", "gpt2"])
def test_round_trip(tmp_path, tokenizer_folder, eye, tongue):
    trained = different(tiny.vlm(tokenizer_folder, eye, tongue))
    run = save(trained, EVERY, tmp_path / "run")
    fresh = tiny.vlm(tokenizer_folder, eye, tongue)
    assert not same(fresh, trained)
    assert fill_parts(fresh, [run]) == {part: run / "artifacts" / part for part in EVERY}
    assert same(fresh, trained)
    with torch.no_grad():
        assert torch.equal(fresh.features(PIXELS), trained.features(PIXELS))


def test_a_card_says_what_and_beside_what(tmp_path, tokenizer_folder):
    model = tiny.vlm(tokenizer_folder)
    run = save(model, ["connector"], tmp_path / "run")
    assert [path.name for path in (run / "artifacts").iterdir()] == ["connector"]
    card = json.loads((run / "artifacts" / "connector" / CARD).read_text())
    assert (card["part"], card["class"], card["run"]) == ("connector", "MLPConnector", "run")
    assert card["shapes"]["layers.0.weight"] == [24, 32]
    assert set(card["against"]) == {"vision", "language"}
    assert card["against"]["vision"]["content_hash"] == content_hash(model.vision)
    assert card["against"]["vision"]["feature_layer"] == -2


def test_a_part_alone_is_loaded_and_the_others_stay(tmp_path, tokenizer_folder):
    trained = tiny.vlm(tokenizer_folder)
    different(trained.vision)
    different(trained.language)
    run = save(trained, ["vision", "language"], tmp_path / "run")
    fresh = tiny.vlm(tokenizer_folder)
    connector = {name: value.clone() for name, value in fresh.connector.state_dict().items()}
    assert set(fill_parts(fresh, [run])) == {"vision", "language"}
    assert same(fresh.vision, trained.vision) and same(fresh.language, trained.language)
    assert all(torch.equal(connector[k], v) for k, v in fresh.connector.state_dict().items())


def test_a_part_that_learned_in_part_is_written_whole_and_once(tmp_path, tokenizer_folder):
    trained = different(tiny.vlm(tokenizer_folder))
    names = ["language.causal.lm_head", "connector", "language.causal.model.layers.0"]
    written = save_parts(trained, names, tmp_path / "run" / "artifacts", {}, describe_frozen(trained, names))
    assert [folder.name for folder in written] == ["language", "connector"]
    card = json.loads((written[1] / CARD).read_text())
    assert set(card["against"]) == {"vision"}
    fresh = tiny.vlm(tokenizer_folder)
    fresh.vision.load_state_dict(trained.vision.state_dict())
    fill_parts(fresh, [tmp_path / "run"])
    assert same(fresh, trained)


def test_a_later_run_wins(tmp_path, tokenizer_folder):
    first, second = tiny.vlm(tokenizer_folder), different(tiny.vlm(tokenizer_folder))
    runs = [save(first, EVERY, tmp_path / "first"), save(second, EVERY, tmp_path / "second")]
    fresh = tiny.vlm(tokenizer_folder)
    fill_parts(fresh, runs)
    assert same(fresh, second)
    fill_parts(fresh, runs[::-1])
    assert same(fresh, first)


def test_tied_weights_stay_tied(tmp_path, tokenizer_folder):
    def tied() -> Any:
        model = tiny.vlm(tokenizer_folder)
        size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        fields = {**tiny.LANGUAGE["llama"], **size, "tie_word_embeddings": True}
        model.language = LanguageModel(
            LanguageModelConfig(init="random", architecture=fields, tokenizer=str(tokenizer_folder))
        )
        return model

    trained = tied()
    different(trained.language)
    run = save(trained, ["language"], tmp_path / "run")
    fresh = tied()
    fill_parts(fresh, [run])
    assert same(fresh.language, trained.language)
    causal = fresh.language.causal
    assert causal.get_output_embeddings().weight is causal.get_input_embeddings().weight
    loaded: Any = AutoModelForCausalLM.from_pretrained(run / "artifacts" / "language")
    assert torch.equal(loaded.lm_head.weight, causal.lm_head.weight)


@pytest.mark.parametrize("eye", tiny.VISION)
def test_the_vision_folder_is_a_whole_transformers_model(tmp_path, tokenizer_folder, eye):
    model = tiny.vlm(tokenizer_folder, eye)
    run = save(model, ["vision"], tmp_path / "run")
    auto = Blip2VisionModel if eye == "blip2" else AutoModel  # AutoModel does not know it
    theirs, info = auto.from_pretrained(run / "artifacts" / "vision", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len(model.vision.unused_layers) == 1, "and ours runs the layers it needs, as before"
    pixels = (PIXELS - model.vision.mean) / model.vision.std
    with torch.no_grad():
        hidden = theirs.eval()(pixel_values=pixels, output_hidden_states=True).hidden_states
        expected = hidden[-2][:, model.vision.prefix :]
        assert torch.allclose(model.features(PIXELS), expected, atol=1e-5)


@pytest.mark.parametrize("tongue", tiny.LANGUAGE)
def test_the_language_folder_is_a_transformers_model_with_its_tokenizer(tmp_path, tokenizer_folder, tongue):
    model = tiny.vlm(tokenizer_folder, tongue=tongue)
    folder = save(model, ["language"], tmp_path / "run") / "artifacts" / "language"
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("what color is the circle?")["input_ids"]])
    assert ids.tolist() == [model.language.tokenizer("what color is the circle?")["input_ids"]]
    ones = torch.ones_like(ids)
    with torch.no_grad():
        ours = model.language(model.language.embed(ids), ones.bool(), ones, 0 * ones, ones.cumsum(1) - 1, False)
        assert torch.allclose(ours, theirs.eval()(ids).logits[0], atol=1e-5)


def test_a_folder_starts_a_model_as_its_source(tmp_path, tokenizer_folder):
    model = tiny.vlm(tokenizer_folder)
    folder = save(model, ["language"], tmp_path / "run") / "artifacts" / "language"
    started = nn.ModuleDict({"language": LanguageModel(LanguageModelConfig(source=str(folder)))})
    assert all(value.is_meta for value in started.parameters()), "nothing is read before the parts are filled"
    assert fill_parts(started, []) == {}
    assert same(started["language"].causal, model.language.causal)


def test_an_artifact_wins_over_the_source_which_is_not_read(tmp_path, tokenizer_folder):
    model = tiny.vlm(tokenizer_folder)
    source = save(model, ["language"], tmp_path / "first") / "artifacts" / "language"
    run = save(different(model), ["language"], tmp_path / "second")
    started = nn.ModuleDict({"language": LanguageModel(LanguageModelConfig(source=str(source)))})
    (source / "model.safetensors").unlink()
    started.requires_grad_(False)
    assert fill_parts(started, [run]) == {"language": run / "artifacts" / "language"}
    assert same(started["language"].causal, model.language.causal)
    assert not any(value.requires_grad for value in started.parameters())


def test_other_shapes_are_refused(tmp_path, tokenizer_folder):
    run = save(tiny.vlm(tokenizer_folder), ["connector"], tmp_path / "run")
    with pytest.raises(ConfigError, match=r"connector does not fit the model: layers.0.bias is .24. there and"):
        fill_parts(tiny.vlm(tokenizer_folder, connector="linear"), [run])
    run = save(tiny.vlm(tokenizer_folder), ["vision"], tmp_path / "eye")
    other = tiny.vlm(tokenizer_folder)
    other.vision = tiny.vision("siglip")
    with pytest.raises(ConfigError, match=r"does not fit .* is a clip_vision_model, not a siglip_vision_model"):
        fill_parts(other, [run])
    fields = {**other.vision.config.to_dict(), "hidden_size": 48}
    fields = {k: fields[k] for k in ("hidden_size", "num_hidden_layers", "image_size", "patch_size")}
    fields |= {"model_type": "clip_vision_model", "num_attention_heads": 2, "intermediate_size": 48}
    other.vision = VisionEncoder(VisionEncoderConfig(init="random", architecture=fields))
    with pytest.raises(ConfigError, match=r"does not fit the model: .* is .* there and .* here"):
        fill_parts(other, [run])


def test_a_connector_beside_another_encoder_is_refused(tmp_path, tokenizer_folder):
    model = tiny.vlm(tokenizer_folder)
    connector = save(model, ["connector"], tmp_path / "connector")
    other = tiny.vlm(tokenizer_folder)
    fill_parts(other, [connector])
    different(other.vision)
    with pytest.raises(ConfigError, match="trained with another vision: its content_hash was"):
        fill_parts(other, [connector])
    eye = save(model, ["vision"], tmp_path / "eye")
    for runs in ([eye, connector], [connector, eye]):
        fill_parts(different(other), [*runs, save(model, ["language"], tmp_path / "language")])
        assert same(other, model), "loaded along, they are the parts that it knows"


def test_a_connector_beside_another_language_model_is_refused(tmp_path, tokenizer_folder):
    run = save(tiny.vlm(tokenizer_folder), ["connector"], tmp_path / "run")
    other = tiny.vlm(tokenizer_folder)
    different(other.language)
    with pytest.raises(ConfigError, match=r"with another language: its content_hash was .* train connector again"):
        fill_parts(other, [run])


def test_a_connector_for_another_feature_layer_is_refused(tmp_path, tokenizer_folder):
    model = tiny.vlm(tokenizer_folder)
    run = save(model, ["connector"], tmp_path / "run")
    eye = save(model, ["vision"], tmp_path / "eye")
    other = tiny.vlm(tokenizer_folder)
    other.vision = tiny.vision(feature_layer=-1)
    with pytest.raises(ConfigError, match="trained with another vision"):
        fill_parts(other, [eye, run])


def test_a_run_without_artifacts_is_refused(tmp_path, tokenizer_folder):
    model = tiny.vlm(tokenizer_folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ConfigError, match="no artifact for vision, connector, language: it has no artifacts; the same `mmlab train`"
    ):
        fill_parts(model, [tmp_path / "empty"])
    heads = nn.ModuleDict({"head": nn.Linear(2, 2)})
    with pytest.raises(ConfigError, match="it has head"):
        fill_parts(model, [save(heads, ["head"], tmp_path / "run")])


def test_training_changes_the_hash(tokenizer_folder):
    model = tiny.vlm(tokenizer_folder)
    before = content_hash(model.language)
    optimizer = torch.optim.SGD(model.language.parameters(), lr=0.1)
    ids = torch.tensor([[1, 2, 3, 4]])
    model.language.causal(ids, labels=ids).loss.backward()
    optimizer.step()
    assert content_hash(model.language) != before


def flip_signs(path: Path) -> None:
    """Flip the sign bits of the last numbers of a file, without any other change."""
    data = bytearray(path.read_bytes())
    for place in range(len(data) - 1, len(data) - 41, -4):
        data[place] ^= 0x80
    path.write_bytes(data)


DAMAGE = {
    "changed": (flip_signs, "model.safetensors has changed since the run wrote it: restore"),
    "config": (lambda path: path.with_name("config.json").write_text("{}"), "config.json has changed"),
    "missing": (lambda path: path.with_name("config.json").unlink(), "config.json is missing"),
    "added": (lambda path: path.with_name("adapter_config.json").write_text("{}"), "adapter_config.json was added"),
    "card": (lambda path: path.with_name(CARD).write_text("{"), "card.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_that_changed_is_refused(tmp_path, tokenizer_folder, damage):
    model = tiny.vlm(tokenizer_folder)
    run = save(model, ["vision"], tmp_path / "run")
    (run / "artifacts" / "vision" / ".DS_Store").touch()
    fill_parts(model, [run])
    change, message = DAMAGE[damage]
    change(run / "artifacts" / "vision" / "model.safetensors")
    with pytest.raises(RunError, match=f"vision/{message}"):
        fill_parts(model, [run])


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_an_artifact_that_is_a_source_is_verified_too(tmp_path, tokenizer_folder, file):
    folder = save(tiny.vlm(tokenizer_folder), ["language"], tmp_path / "run") / "artifacts" / "language"
    if file == "model.safetensors":
        flip_signs(folder / file)
    else:
        (folder / file).write_text((folder / file).read_text() + "\n")
    with pytest.raises(RunError, match=f"{file} has changed"):
        fill_parts(nn.ModuleDict({"language": LanguageModel(LanguageModelConfig(source=str(folder)))}), [])


def test_a_card_without_facts_has_no_hashes(tmp_path):
    card = tmp_path / "artifacts" / "connector" / "card.json"
    card.parent.mkdir(parents=True)
    card.write_text("{}")
    assert content_hashes(tmp_path) == {"connector": None}


def test_artifacts_are_replaced_as_a_whole(tmp_path):
    model = nn.ModuleDict({"head": nn.Linear(2, 2)})
    folder = save(model, ["head"], tmp_path / "run") / "artifacts"
    (folder / "head" / "shard-2.safetensors").touch()
    (folder / f"{DRAFT}1-head").mkdir()  # of a killed process
    save(different(model), ["head"], tmp_path / "run")
    assert sorted(path.name for path in folder.iterdir()) == ["head"]
    assert sorted(path.name for path in (folder / "head").iterdir()) == [CARD, "model.safetensors"]
    fill_parts(model, [tmp_path / "run"])


def test_frozen_parts_are_known_by_the_weights_that_were_read(tmp_path, tokenizer_folder):
    """Training in bf16 rounds them afterwards."""
    model = tiny.vlm(tokenizer_folder)
    frozen = describe_frozen(model, ["connector.layers"])
    assert set(frozen) == {"vision", "language"}
    save_parts(model.to(torch.bfloat16), ["connector"], tmp_path / "run" / "artifacts", {}, frozen)
    fill_parts(tiny.vlm(tokenizer_folder), [tmp_path / "run"])
    assert frozen["vision"] != describe_frozen(model, ["connector"])["vision"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_neither_written_nor_read(tmp_path, value):
    def model(second: float = 0.0) -> nn.ModuleDict:
        parts = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.BatchNorm1d(2)})
        parts["second"].running_var[1] = second  # type: ignore[index]
        parts["second"].register_buffer("mask", torch.full((2,), -torch.inf))
        return parts

    with pytest.raises(RunError, match="The trained part second has NaN or infinity in running_var"):
        save(model(value), ["first", "second"], tmp_path / "run")
    assert not (tmp_path / "run" / "artifacts").exists(), "nor is any other part"
    run = save(model(), ["first", "second"], tmp_path / "run")
    fill_parts(model(), [run])
    folder = run / "artifacts" / "second"
    save_file(model(value)["second"].state_dict(), folder / "model.safetensors")
    card = json.loads((folder / CARD).read_text())
    write_card(folder, card)  # put there by hand
    with pytest.raises(RunError, match="artifacts/second has NaN or infinity in running_var"):
        fill_parts(model(), [run])


def test_a_part_that_a_run_changed_is_described_as_it_is_written(tmp_path):
    """A first stage of which latents are measured may be one with a merged adapter, which has an identity."""
    model: Any = nn.ModuleDict({"first_stage": nn.BatchNorm1d(3), "denoiser": nn.Linear(3, 3)})
    note_identity(model.first_stage, "of a base and an adapter")
    model.first_stage.running_mean.fill_(1.0)
    against = {"first_stage": describe(model.first_stage, trained=True)}
    save_parts(model, ["denoiser", "first_stage"], tmp_path / "artifacts", {}, against)
    other: Any = nn.ModuleDict({"first_stage": nn.BatchNorm1d(3), "denoiser": nn.Linear(3, 3)})
    fill_parts(other, [tmp_path])
    assert same(other, model)


class Own(nn.Linear):
    """A part of a user's package."""

    def load_pretrained(self) -> None:
        if self.in_features == 1:
            torch.load("nowhere.pt")
        nn.init.constant_(self.weight, float("nan"))


def test_weights_that_an_own_part_reads_are_checked():
    with pytest.raises(ConfigError, match=r"model\.eye: Own cannot load its weights: .*nowhere\.pt"):
        fill_parts(nn.ModuleDict({"eye": Own(1, 1)}), [])
    with pytest.raises(RunError, match=r"model\.eye \(Own\) has NaN or infinity in weight"):
        fill_parts(nn.ModuleDict({"eye": Own(2, 1)}), [])
