"""Parts start from pipelines of diffusers, and draw what these draw from the same noise."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LDMPipeline  # pyright: ignore[reportPrivateImportUsage]
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.diffusion.config import DiffusionConfig, GuidanceConfig, SamplerConfig
from mmlab.diffusion.process import Diffusion
from mmlab.diffusion.samplers import Sampler
from mmlab.export.diffusion_export import export_pipeline
from mmlab.model import diffusers_source
from mmlab.model.autoencoder import KLAutoencoder, VQAutoencoder
from mmlab.model.conditioner import ClassCondition, NoCondition, TextCondition
from mmlab.model.config import (
    ClassConditionConfig,
    DiTConfig,
    KLAutoencoderConfig,
    TextConditionConfig,
    UNetConfig,
    VectorQuantizerConfig,
    VQAutoencoderConfig,
)
from mmlab.model.denoiser import DiffusionModel, UNet
from mmlab.model.diffusers_source import scheduler_of
from mmlab.model.dit import DiT
from mmlab.model.quantizer import VectorQuantizer
from mmlab.training.filling import fill_parts, random_parts
from tests.model import tiny_pipelines as tiny

STEPS, PROMPTS = 4, ["a red circle", "blue?"]


@pytest.fixture(scope="session")
def sd21(tmp_path_factory) -> Path:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("sd21") / "sd", second=True, variant="fp16")


@pytest.fixture(scope="session")
def dit(tmp_path_factory) -> Path:
    return tiny.dit(tmp_path_factory.mktemp("dit") / "dit")


def from_text_pipeline(folder: Path | str) -> DiffusionModel:
    source = str(folder)
    model = DiffusionModel(
        KLAutoencoder(KLAutoencoderConfig(source=source)),
        TextCondition(TextConditionConfig(source=source, max_length=tiny.LENGTH)),
        partial(UNet, UNetConfig(source=source)),
    )
    assert fill_parts(model, []) == {} and random_parts(model, {}) == []
    return model.eval()


def sampler(scale: float = 2.5) -> Sampler:
    return Sampler(SamplerConfig(steps=STEPS, guidance=GuidanceConfig(scale)))


def noise() -> Tensor:
    return torch.randn(2, 4, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def ours(model: DiffusionModel, process: Diffusion, condition: Any) -> Tensor:
    latents = sampler()(model, process, noise(), condition=condition, null=model.conditioner.null(2, "cpu"))
    return (model.first_stage.decode(model.first_stage.raw(latents)) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def theirs(folder: Path, **options: Any) -> Tensor:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    # Without set_alpha_to_one the last step of this DDIM would end at the first timestep.
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    return pipeline(PROMPTS, latents=noise(), num_inference_steps=STEPS, guidance_scale=2.5, output_type="pt").images


def same(left: Tensor, right: Tensor) -> None:
    assert left.std() > 0.01 and ((left > 0.001) & (left < 0.999)).float().mean() > 0.3
    torch.testing.assert_close(left, right, rtol=0, atol=1e-4)


STABLE = {"schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize(("name", "target"), [("stable_diffusion", "epsilon"), ("sd21", "v")])
def test_a_text_pipeline_draws_and_is_exported_as_it_is(request, tmp_path, name, target):
    folder = request.getfixturevalue(name)
    model, process = from_text_pipeline(folder), Diffusion(DiffusionConfig(**STABLE, target=target))
    conditioner = model.conditioner
    assert isinstance(conditioner, TextCondition)
    drawn = ours(model, process, conditioner(conditioner.tokenize(PROMPTS)))
    options = {"variant": "fp16", "torch_dtype": torch.float32} if name == "sd21" else {}
    same(drawn, theirs(folder, **options))
    export_pipeline(model, process, tiny.SIZE, tmp_path / "out", sampler())
    same(drawn, theirs(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["names", "number"])
def test_a_dit_pipeline_draws_and_is_exported_as_it_is(dit, tmp_path, kind):
    source = str(dit)
    model = DiffusionModel(
        KLAutoencoder(KLAutoencoderConfig(source=source)),
        ClassCondition(
            ClassConditionConfig(source=source, classes=tiny.CLASSES if kind == "names" else 1000, width=16)
        ),
        partial(DiT, DiTConfig(source=source, depth=2, width=16, heads=2)),
    )
    fill_parts(model, [])
    model.eval()
    process = Diffusion(DiffusionConfig())
    drawn = ours(model, process, model.conditioner({"labels": torch.tensor([2, 0])}))
    if kind == "number":
        export_pipeline(model, process, tiny.SIZE, tmp_path / "out", sampler())
    for folder in (dit, *([tmp_path / "out"] if kind == "number" else [])):
        pipeline: Any = DiTPipeline.from_pretrained(folder, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, timestep_spacing="trailing")
        options = {"guidance_scale": 2.5, "num_inference_steps": STEPS, "output_type": "pt"}
        same(drawn, pipeline([2, 0], generator=torch.Generator().manual_seed(7), **options).images)


def test_weights_are_counted_by_a_pipeline_that_is_here(stable_diffusion):
    source, other = str(stable_diffusion), {"block_out_channels": [8, 16]}
    text = {"model_type": "clip_text_model", "hidden_size": 48}
    with torch.device("meta"):
        model = DiffusionModel(
            KLAutoencoder(KLAutoencoderConfig(source=source, architecture=other)),
            TextCondition(TextConditionConfig(source=source, architecture=text, max_length=tiny.LENGTH)),
            partial(UNet, UNetConfig(source=source, architecture=other)),
        )
    real = from_text_pipeline(stable_diffusion)
    assert all(weight.is_meta for weight in model.parameters())
    assert [w.numel() for w in model.parameters()] == [w.numel() for w in real.parameters()]


def vq(source: str, **options: Any) -> VQAutoencoder:
    book = VectorQuantizer(VectorQuantizerConfig(**{"codes": 16, "width": 3, "normalize": False, **options}))
    return VQAutoencoder(VQAutoencoderConfig(architecture=tiny.VQ, source=source), book)


@pytest.mark.parametrize("scaling", [0.4, 1.0])
def test_an_unconditional_pipeline_on_codes_draws_and_comes_back_as_it_is(tmp_path, scaling):
    def filled(source: str) -> DiffusionModel:
        model = DiffusionModel(vq(source), NoCondition(), partial(UNet, UNetConfig(source=source)))
        fill_parts(model, [])
        return model.eval()

    folder = tiny.latent_diffusion(tmp_path / "ldm", scaling)
    model, process = filled(str(folder)), Diffusion(DiffusionConfig(schedule="scaled_linear"))
    stated = (model.first_stage.measured, model.first_stage.latent_std.tolist())
    assert stated == (scaling != 1, [pytest.approx(1 / scaling)] * 3)
    latents = torch.randn(2, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        drawn = Sampler(SamplerConfig(steps=STEPS))(model, process, latents, condition={}, null={})
        drawn = (model.first_stage.decode(model.first_stage.raw(drawn)) / 2 + 0.5).clamp(0, 1)
    export_pipeline(model, process, tiny.SIZE, tmp_path / "out", Sampler(SamplerConfig(steps=STEPS)))
    again = filled(str(tmp_path / "out"))
    weights = again.denoiser.state_dict()
    assert all(value.equal(weights[name]) for name, value in model.denoiser.state_dict().items())
    assert torch.equal(again.first_stage.latent_std, model.first_stage.latent_std)
    pipeline: Any = LDMPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    options = {"batch_size": 2, "num_inference_steps": STEPS, "output_type": "np"}
    theirs = pipeline(generator=torch.Generator().manual_seed(7), **options).images
    same(drawn, torch.from_numpy(theirs).permute(0, 3, 1, 2))
    with pytest.raises(ConfigError, match="it has codes=16, not 8"):
        vq(str(folder), codes=8).load_pretrained()
    with pytest.raises(ConfigError, match="has no moving averages; set model/first_stage/quantizer=nearest"):
        vq(str(folder), ema=0.9).load_pretrained()


def test_our_own_export_of_classes_comes_back(tmp_path):
    sizes = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    torch.manual_seed(0)
    names, process = ["cat", "dog"], Diffusion(DiffusionConfig())
    first_stage = KLAutoencoder(
        KLAutoencoderConfig(init="random", architecture={**sizes_of_vae(), "latent_channels": 4})
    )
    first_stage.set_statistics(torch.full((4,), 0.3), torch.full((4,), 2.0))
    classes = ClassCondition(ClassConditionConfig(classes=names, width=12))
    torch.nn.init.normal_(classes.embedding.weight, std=3)
    model = DiffusionModel(first_stage, classes, partial(UNet, UNetConfig(architecture=sizes))).eval()
    export_pipeline(model, process, tiny.SIZE, tmp_path / "out", sampler())
    source = str(tmp_path / "out")
    again = DiffusionModel(
        KLAutoencoder(KLAutoencoderConfig(source=source)),
        ClassCondition(ClassConditionConfig(source=source, classes=names, width=32)),
        partial(UNet, UNetConfig(source=source)),
    )
    fill_parts(again, [])
    batch = {"labels": torch.tensor([1, 0])}
    same(ours(again.eval(), process, again.conditioner(batch)), ours(model, process, model.conditioner(batch)))
    with pytest.raises(ConfigError, match=r"set model.conditioner.classes=\[cat,dog\], in this order, not \[dog,cat\]"):
        ClassCondition(ClassConditionConfig(source=source, classes=["dog", "cat"], width=32)).load_pretrained()
    with pytest.raises(ConfigError, match=r"has 2 classes, but model.conditioner.classes 3"):
        ClassCondition(ClassConditionConfig(source=source, classes=3, width=32)).load_pretrained()
    with pytest.raises(ConfigError, match="is conditioned on a class, but the conditioner has no vector"):
        UNet(UNetConfig(source=source), 4)


def sizes_of_vae() -> dict[str, Any]:
    return {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}


def test_shards_and_a_part_s_own_folder_are_read(stable_diffusion, tmp_path):
    kind: Any = UNet2DConditionModel
    whole = kind.from_pretrained(stable_diffusion, subfolder="unet", low_cpu_mem_usage=False)
    whole.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    weights = whole.state_dict()
    for source in (tmp_path, stable_diffusion / "unet"):
        denoiser = UNet(UNetConfig(source=str(source)), 4, context_width=32)
        denoiser.load_pretrained()
        assert all(value.equal(weights[name]) for name, value in denoiser.unet.state_dict().items())
        assert scheduler_of(str(source)) == {}, "a part alone states no process"


def test_a_pipeline_on_the_hub_is_read_part_by_part(stable_diffusion, monkeypatch):
    asked: list[str] = []

    def find(root: str, name: str) -> Path | None:
        assert root == "owner/name"
        asked.append(name)
        return path if (path := stable_diffusion / name).is_file() else None

    monkeypatch.setattr(diffusers_source, "find", find)
    for source in ("owner/name", "owner/name/text_encoder"):
        place = diffusers_source.text_place(source, "conditioner")
        assert place is not None and place.folder() == str(stable_diffusion / "text_encoder")
        assert not any(name.endswith("safetensors") for name in asked), "weights are read when they are needed"
        assert diffusers_source.tokenizer_folder(place) == str(stable_diffusion / "tokenizer")
        assert diffusers_source.fetch_text(place) == str(stable_diffusion / "text_encoder")
        assert "text_encoder/model.safetensors" in asked
        asked.clear()
    assert diffusers_source.scheduler_of("owner/name")["beta_end"] == 0.012


def edited(folder: Path, out: Path, **fields: Any) -> str:
    """A UNet's folder without weights, whose config has other fields."""
    config = json.loads((folder / "unet/config.json").read_text())
    out.mkdir()
    (out / "config.json").write_text(json.dumps({**config, **fields}))
    return str(out)


@pytest.mark.parametrize(
    ("fields", "width", "says"),
    [
        ({"in_channels": 9}, 32, "has in_channels=9, but the first stage has latents of 4 channels"),
        ({"addition_embed_type": "text_time"}, 32, "is conditioned on pooled texts and image sizes"),
        ({"class_embed_type": "timestep"}, 32, "is conditioned on a timestep"),
        ({}, 48, r"a context of width 32, but the conditioner's is 48; set model\.conditioner\.source="),
        ({}, None, r"but the conditioner has none; set model/conditioner=pretrained model\.conditioner\.source="),
        ({"_class_name": "FluxTransformer2DModel"}, 32, "is not a UNet: its class is FluxTransformer2DModel"),
        ({"_class_name": "UNet2DModel"}, 32, "attends to no context; set model/conditioner=none"),
    ],
)
def test_a_unet_for_something_else_is_refused(stable_diffusion, tmp_path, fields, width, says):
    with pytest.raises(ConfigError, match=says):
        UNet(UNetConfig(source=edited(stable_diffusion, tmp_path / "unet", **fields)), 4, context_width=width)


def test_what_a_source_lacks_is_said(stable_diffusion, dit, tmp_path):
    with pytest.raises(ConfigError, match="is a DiTPipeline without unet or denoiser; it has scheduler, transformer"):
        UNet(UNetConfig(source=str(dit)), 4)
    with pytest.raises(ConfigError, match="is a DiTPipeline without text_encoder"):
        TextCondition(TextConditionConfig(source=str(dit)))
    with pytest.raises(ConfigError, match="embeds no classes; leave it out"):
        ClassCondition(ClassConditionConfig(source=str(stable_diffusion), classes=3)).load_pretrained()
    with pytest.raises(ConfigError, match="is conditioned on classes alone; set model/conditioner=class"):
        DiT(DiTConfig(source=str(dit), depth=2, width=16, heads=2), 4, context_width=32)
    with pytest.raises(ConfigError, match=r"has depth=2, not 3; set model\.denoiser\.depth=2"):
        DiT(DiTConfig(source=str(dit), depth=3, width=16, heads=2), 4, vector_width=16).load_pretrained()
    source = edited(stable_diffusion, tmp_path / "unet")
    denoiser = UNet(UNetConfig(source=source), 4, context_width=32)
    torch.save({}, tmp_path / "unet/diffusion_pytorch_model.bin")  # a pickle is not read
    with pytest.raises(
        ConfigError, match=r"it has no diffusion_pytorch_model\.safetensors, only a pickle \(\.bin\), which"
    ):
        denoiser.load_pretrained()
    with pytest.raises(ConfigError, match=r"model_index\.json is a file, not a folder of diffusers"):
        UNet(UNetConfig(source=str(dit / "model_index.json")), 4)


def test_weights_that_cannot_be_read_are_one_sentence(stable_diffusion, tmp_path):
    path = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    denoiser = UNet(UNetConfig(source=edited(stable_diffusion, path.parent)), 4, context_width=32)
    weights = load_file(stable_diffusion / "unet" / path.name)
    save_file({**weights, "conv_in.weight": weights["conv_in.weight"][:8].contiguous()}, path)
    with pytest.raises(ConfigError, match=r"is not a UNet: size mismatch for conv_in\.weight"):
        denoiser.load_pretrained()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"is damaged or incomplete \(.*\); download it again"):
        denoiser.load_pretrained()
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ConfigError, match="is a pointer of Git LFS"):
        denoiser.load_pretrained()
    save_file(weights, path)
    path.with_name("diffusion_pytorch_model.fp16.safetensors").write_text("damaged")  # is not read
    denoiser.load_pretrained()


def test_a_pipeline_without_a_tokenizer_is_refused(stable_diffusion, tmp_path):
    shutil.copytree(stable_diffusion / "text_encoder", tmp_path / "text_encoder")
    shutil.copy(stable_diffusion / "model_index.json", tmp_path)
    with pytest.raises(ConfigError, match=r"has a text encoder and no tokenizer; set model\.conditioner\.tokenizer"):
        TextCondition(TextConditionConfig(source=str(tmp_path), max_length=tiny.LENGTH))
    tokenizer = str(stable_diffusion / "tokenizer")
    TextCondition(TextConditionConfig(source=str(tmp_path), tokenizer=tokenizer, max_length=tiny.LENGTH))
