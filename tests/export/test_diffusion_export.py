"""Exported pipelines give our pictures: same noise, same grid, their code on one side and ours on the other."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as img2img
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_inpaint as inpaint
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from mmlab.config.errors import ConfigError
from mmlab.diffusion.config import (
    ClipConfig,
    DiffusionConfig,
    EDMConfig,
    FlowMatchingConfig,
    GuidanceConfig,
    SamplerConfig,
)
from mmlab.diffusion.edm import EDM
from mmlab.diffusion.flow import FlowMatching
from mmlab.diffusion.guidance import Clip
from mmlab.diffusion.process import Diffusion, NoiseProcess
from mmlab.diffusion.samplers import Sampler
from mmlab.diffusion.stated_process import check_process
from mmlab.evaluate.pictures.generators import picture_generator
from mmlab.evaluate.pictures.source_images import IMAGE, MASK
from mmlab.export.diffusion_export import export_first_stage, export_pipeline
from mmlab.export.schedulers import scheduler
from mmlab.model.autoencoder import KLAutoencoder, VQAutoencoder
from mmlab.model.conditioner import ClassCondition, Condition, Conditioner, NoCondition, TextCondition
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
from mmlab.model.first_stage import FirstStage, Identity
from mmlab.model.quantizer import VectorQuantizer

SIZE, STEPS = 16, 5
NAME = "diffusion_pytorch_model.safetensors"
NAMES = ["cat", "dog", "red fox"]
AUTOENCODER = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
UNET = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
SCALED = {"schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def diffusion(**settings: Any) -> Diffusion:
    return Diffusion(DiffusionConfig(**settings))


def flow(**settings: Any) -> FlowMatching:
    return FlowMatching(FlowMatchingConfig(**settings))


def edm(**settings: Any) -> EDM:
    return EDM(EDMConfig(**settings))


def clipping(**settings: Any) -> Clip:
    return Clip(ClipConfig(**settings))


def sampling(clip: Clip | None = None, **settings: Any) -> Sampler:
    return Sampler(SamplerConfig(**{"name": "ddim", "steps": STEPS, **settings}), clip)


LDM = partial(diffusion, **SCALED)


def kl() -> KLAutoencoder:
    first_stage = KLAutoencoder(KLAutoencoderConfig(init="random", architecture=AUTOENCODER))
    first_stage.set_statistics(torch.tensor([0.3, -0.2, 0.0, 1.0]), torch.tensor([0.5, 2.0, 1.0, 3.0]))
    return first_stage


def classes(width: int = 12, **options: Any) -> ClassCondition:
    return ClassCondition(ClassConditionConfig(classes=NAMES, width=width, **options))


def vq(normalize: bool) -> VQAutoencoder:
    quantizer = VectorQuantizer(VectorQuantizerConfig(codes=64, width=3, normalize=normalize))
    nn.init.normal_(quantizer.codebook)
    first_stage = VQAutoencoder(VQAutoencoderConfig(architecture={**AUTOENCODER, "latent_channels": 5}), quantizer)
    first_stage.set_statistics(torch.tensor([0.3, -0.2, 0.0]), torch.tensor([0.5, 2.0, 1.0]))
    return first_stage


def bert(tokenizer_folder: Path, **options: Any) -> TextCondition:
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = {"tokenizer": str(tokenizer_folder), "max_length": 12, **options}
    return TextCondition(TextConditionConfig(init="random", architecture={"model_type": "bert", **size}, **settings))


def model(first_stage: FirstStage, conditioner: Conditioner, kind: str = "unet") -> DiffusionModel:
    """Weights large enough that class and text show in the pictures, and small enough for float32."""
    torch.manual_seed(0)
    dit, unet = DiTConfig(depth=2, width=16, heads=2), UNetConfig(architecture=UNET)
    denoiser = partial(UNet, unet) if kind == "unet" else partial(DiT, dit)
    built = DiffusionModel(first_stage, conditioner, denoiser)
    if kind == "dit":
        for parameter in built.denoiser.parameters():
            nn.init.normal_(parameter, std=0.1)
    if isinstance(conditioner, ClassCondition):
        nn.init.normal_(conditioner.embedding.weight, std=3)
    return built.eval()


def noise(built: DiffusionModel, count: int) -> Tensor:
    side = SIZE // built.first_stage.factor
    return torch.randn(count, built.first_stage.channels, side, side, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def pictures(
    built: DiffusionModel,
    process: NoiseProcess,
    condition: Condition,
    scale: float,
    count: int,
    clip: Clip | None = None,
) -> Tensor:
    """What we sample, in 0 … 1."""
    sampler = Sampler(SamplerConfig(name="ddim", steps=STEPS, guidance=GuidanceConfig(scale)), clip=clip)
    null = built.conditioner.null(count, "cpu")
    latents = sampler(built, process, noise(built, count), condition=condition, null=null)
    return (built.first_stage.decode(built.first_stage.raw(latents)) / 2 + 0.5).clamp(0, 1)


def same(theirs: Any, ours: Tensor) -> None:
    theirs = torch.as_tensor(theirs)
    assert ours.std() > 0.01 and ((ours > 0.001) & (ours < 0.999)).float().mean() > 0.3
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def load(kind: Any, folder: Path, **options: Any) -> Any:
    pipeline = kind.from_pretrained(folder, local_files_only=True, **options)
    if isinstance(pipeline, DiffusionPipeline):
        pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("scale", [1.0, 2.5])
@torch.no_grad()
def test_text_is_stable_diffusion(tokenizer_folder, tmp_path, scale):
    built, process = model(kl(), bert(tokenizer_folder)), LDM()
    line = export_pipeline(built, process, SIZE, tmp_path / "out", sampling())
    told = f"call it with num_inference_steps={STEPS}, guidance_scale=1.0, as the run samples"
    assert line == f'StableDiffusionPipeline.from_pretrained("{tmp_path / "out"}")  # {told}'
    pipeline = load(StableDiffusionPipeline, tmp_path / "out")
    conditioner = built.conditioner
    assert isinstance(conditioner, TextCondition)
    texts = ["what color is the red circle?", "red"]
    ours = pictures(built, process, conditioner(conditioner.tokenize(texts)), scale, 2)
    options = {"guidance_scale": scale, "num_inference_steps": STEPS, "output_type": "pt"}
    same(pipeline(texts, latents=noise(built, 2), **options).images, ours)
    assert (ours[0] - pictures(built, process, conditioner.null(2, "cpu"), 1.0, 2)[0]).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "strength"), [("ddim", 0.63), ("dpmpp_2m", 0.3), ("dpmpp_2m", 1.0)])
@torch.no_grad()
def test_images_to_start_from_and_masks_are_those_of_stable_diffusion(
    tokenizer_folder, tmp_path, monkeypatch, name, strength
):
    built, process, sampler = model(kl(), bert(tokenizer_folder)), LDM(), sampling(name=name, steps=20)
    sampler = Sampler(replace(sampler.config, guidance=GuidanceConfig(2.5)))
    export_pipeline(built, process, SIZE, tmp_path / "out", sampler)
    parts = load(StableDiffusionPipeline, tmp_path / "out").components
    texts = ["what color is the red circle?", "red"]
    pixels = torch.randint(256, (2, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(2, 1, SIZE, SIZE, dtype=torch.bool)
    mask[:, :, 2:10, 6:] = True  # whole latents
    generator = picture_generator(built, sampler, process, size=SIZE, strength=strength)
    noises = generator.noise([4, 5])
    told = built.conditioner.tokenize(texts)  # type: ignore[union-attr]
    for module, kind, masked in (
        (img2img, img2img.StableDiffusionImg2ImgPipeline, False),
        (inpaint, inpaint.StableDiffusionInpaintPipeline, True),
    ):
        pipeline: Any = kind(**parts, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noises)
        monkeypatch.setattr(module, "retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
        images: Any = pixels / 255
        options: dict[str, Any] = {"image": images, "strength": strength}
        if masked:
            options |= {"mask_image": mask.float(), "height": SIZE, "width": SIZE}
        theirs = pipeline(texts, num_inference_steps=20, guidance_scale=2.5, output_type="pt", **options).images
        inputs = told | {IMAGE: pixels} | ({MASK: mask} if masked else {})
        latents = generator.draw(inputs, [4, 5], None)
        same(theirs, (generator.pixels(latents) / 2 + 0.5).clamp(0, 1))
        assert (theirs - images).abs().mean() > 0.01


@pytest.mark.parametrize("scale", [1.0, 2.5])
@torch.no_grad()
def test_classes_with_a_transformer_are_dit(tmp_path, scale):
    built, process = (model(kl(), classes(), "dit"), diffusion(schedule="linear", target="v"))
    assert export_pipeline(built, process, SIZE, tmp_path, sampling()).startswith("DiTPipeline")
    pipeline = load(DiTPipeline, tmp_path)
    numbers = pipeline.get_label_ids(["red fox", "cat"])
    ours = pictures(built, process, built.conditioner({"labels": torch.tensor([2, 0])}), scale, 2)
    options = {"guidance_scale": scale, "num_inference_steps": STEPS, "output_type": "pt"}
    same(pipeline(numbers, generator=torch.Generator().manual_seed(7), **options).images, ours)
    assert (ours[0] - ours[1]).abs().max() > 0.05


@pytest.mark.parametrize("settings", [{"schedule": "cosine"}, {**SCALED, "zero_terminal_snr": True}])
@torch.no_grad()
def test_pixels_without_a_condition_are_ddim(tmp_path, settings):
    built, process = model(Identity(), NoCondition()), diffusion(**settings, target="v")
    assert export_pipeline(built, process, SIZE, tmp_path, sampling()).startswith("DDIMPipeline")
    pipeline = load(DDIMPipeline, tmp_path)
    assert pipeline.unet.config.sample_size == SIZE
    options = {"batch_size": 2, "num_inference_steps": STEPS, "output_type": "np"}
    theirs = pipeline(generator=torch.Generator().manual_seed(7), **options).images
    same(torch.from_numpy(theirs).permute(0, 3, 1, 2), pictures(built, process, {}, 1.0, 2))


CLIPS = {"fixed": clipping(limit=0.7), "dynamic": clipping(percentile=0.8)}


@pytest.mark.parametrize("kind", CLIPS)
@torch.no_grad()
def test_ddim_of_pixels_clips_as_the_run_does(tmp_path, kind):
    built, process, clip = model(Identity(), NoCondition()), diffusion(schedule="linear"), CLIPS[kind]
    line = export_pipeline(built, process, SIZE, tmp_path, sampling(clip))
    assert line.startswith("DDIMPipeline") and line.endswith("use_clipped_model_output=True, as the run samples")
    pipeline = eval(line, {"DDIMPipeline": DDIMPipeline})
    pipeline.set_progress_bar_config(disable=True)
    ours = pictures(built, process, {}, 1.0, 2, clip)
    options = {"use_clipped_model_output": True, "num_inference_steps": STEPS, "output_type": "pt"}
    same(pipeline(batch_size=2, generator=torch.Generator().manual_seed(7), **options).images, ours)
    for other in (None, clipping(), *(clip for name, clip in CLIPS.items() if name != kind)):
        assert (pictures(built, process, {}, 1.0, 2, other) - ours).abs().max() > 0.01


@pytest.mark.parametrize("case", ["pixels", "a transformer on latents"])
@pytest.mark.parametrize("kind", CLIPS)
@torch.no_grad()
def test_our_pipeline_clips_as_the_run_does(tmp_path, case, kind):
    pixels = case == "pixels"
    conditioner = classes(32 if pixels else 12)
    built = model(Identity(), conditioner) if pixels else model(kl(), conditioner, "dit")
    process, clip = diffusion(schedule="linear"), CLIPS[kind]
    assert export_pipeline(built, process, SIZE, tmp_path, sampling(clip)).startswith("DiffusionPipeline")
    pipeline = load(DiffusionPipeline, tmp_path, trust_remote_code=True)
    given = built.conditioner({"labels": torch.tensor([2, 0])})
    ours = pictures(built, process, given, 2.5, 2, clip)
    asked = {"guidance_scale": 2.5, "num_inference_steps": STEPS, "output_type": "pt"}
    same(pipeline(["red fox", 0], latents=noise(built, 2), **asked).images, ours)
    assert (pictures(built, process, given, 2.5, 2) - ours).abs().max() > 0.01


OURS = {
    "class beside the time": (kl, classes, "unet", LDM),
    "class as context": (kl, partial(classes, as_context=True), "unet", LDM),
    "pixels": (Identity, partial(classes, 32), "unet", partial(diffusion, schedule="linear", target="x0")),
    "codes": (partial(vq, False), classes, "unet", LDM),
    "codes on the sphere": (partial(vq, True), classes, "unet", LDM),
    "flow": (kl, classes, "unet", partial(flow, shift=2.0)),
    "flow with a transformer": (kl, classes, "dit", flow),
    "edm": (kl, classes, "unet", partial(edm, sigma_max=20.0)),
}


@pytest.mark.parametrize("case", OURS)
@torch.no_grad()
def test_classes_go_with_our_pipeline(tmp_path, case):
    first_stage, conditioner, kind, make = OURS[case]
    torch.manual_seed(0)
    built, process = model(first_stage(), conditioner(), kind), make()
    line = export_pipeline(built, process, SIZE, tmp_path, sampling())
    assert line == f'DiffusionPipeline.from_pretrained("{tmp_path}", trust_remote_code=True)'
    pipeline = load(DiffusionPipeline, tmp_path, trust_remote_code=True)
    assert type(pipeline).__name__ == "LatentDiffusionPipeline" and "mmlab" not in type(pipeline).__module__
    options = {"num_inference_steps": STEPS, "output_type": "pt"}
    given = built.conditioner({"labels": torch.tensor([2, 0])})
    ours = pictures(built, process, given, 2.5, 2)
    same(pipeline(["red fox", 0], guidance_scale=2.5, latents=noise(built, 2), **options).images, ours)
    same(
        pipeline(["red fox", "cat"], latents=noise(built, 2), **options).images, pictures(built, process, given, 1.0, 2)
    )
    none = pictures(built, process, built.conditioner.null(2, "cpu"), 1.0, 2)
    same(pipeline(count=2, generator=torch.Generator().manual_seed(7), **options).images, none)
    assert (none - ours).abs().amax((1, 2, 3)).min() > 1e-3
    check_process(process, scheduler_of(str(tmp_path)), "the export, to train it further")
    with pytest.raises(ValueError, match="no class 'fox'; the classes are cat, dog, red fox"):
        pipeline(["fox"])


@torch.no_grad()
def test_no_condition_in_latents_goes_with_our_pipeline(tmp_path):
    built, process = model(kl(), NoCondition()), LDM()
    export_pipeline(built, process, SIZE, tmp_path, sampling())
    pipeline = load(DiffusionPipeline, tmp_path, trust_remote_code=True)
    images = pipeline(latents=noise(built, 2), count=2, num_inference_steps=STEPS, output_type="pt").images
    same(images, pictures(built, process, {}, 1.0, 2))


@torch.no_grad()
def test_statistics_are_folded_into_the_autoencoder(tmp_path):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    first_stage, x = kl().eval(), torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    export_first_stage(first_stage, tmp_path)
    vae = load(AutoencoderKL, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["scaling_factor"] == 1 and not config.get("shift_factor")
    assert (config["latents_mean"], config["latents_std"]) == ([0] * 4, [1] * 4)
    ours, theirs = first_stage.encode(x), vae.encode(x).latent_dist
    torch.testing.assert_close(theirs.mean, first_stage.normalized(ours.mean), rtol=1e-4, atol=1e-5)
    assert ours.logvar is not None
    std = first_stage.latent_std.view(-1, 1, 1)
    torch.testing.assert_close(theirs.std, (0.5 * ours.logvar).exp() / std, rtol=1e-4, atol=1e-5)
    latents = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(vae.decode(latents).sample, first_stage.decode(first_stage.raw(latents)))


def test_an_exported_autoencoder_is_a_first_stage_of_measured_latents(tmp_path):
    export_first_stage(kl(), tmp_path / "a")
    again = KLAutoencoder(KLAutoencoderConfig(source=str(tmp_path / "a")))
    again.load_pretrained()
    assert again.measured and (again.latent_mean.tolist(), again.latent_std.tolist()) == ([0] * 4, [1] * 4)
    again.save(tmp_path / "saved")
    export_first_stage(again, tmp_path / "b")
    weights = {folder: load_file(tmp_path / folder / NAME) for folder in ("a", "saved", "b")}
    assert all(torch.equal(value, weights[folder][name]) for name, value in weights["a"].items() for folder in weights)


@torch.no_grad()
def test_an_autoencoder_without_1x1_convolutions_gets_them(tmp_path):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    architecture = {**AUTOENCODER, "use_quant_conv": False, "use_post_quant_conv": False}
    first_stage = KLAutoencoder(KLAutoencoderConfig(init="random", architecture=architecture)).eval()
    first_stage.set_statistics(torch.tensor([0.3, -0.2, 0.0, 1.0]), torch.tensor([0.5, 2.0, 1.0, 3.0]))
    export_first_stage(first_stage, tmp_path)
    x, vae = torch.rand(2, 3, SIZE, SIZE), load(AutoencoderKL, tmp_path)
    mean = first_stage.normalized(first_stage.encode(x).mean)
    torch.testing.assert_close(vae.encode(x).latent_dist.mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(mean).sample, first_stage.decode(first_stage.raw(mean)), rtol=1e-4, atol=1e-5)


def test_the_exported_model_is_a_copy(tmp_path):
    built = model(kl(), classes())
    before = {name: value.clone() for name, value in built.state_dict().items()}
    export_pipeline(built, LDM(), SIZE, tmp_path, sampling())
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())
    denoiser = built.denoiser
    assert isinstance(denoiser, UNet) and denoiser.unet.config["class_embed_type"] == "identity"


def test_what_no_pipeline_takes_is_one_sentence(tokenizer_folder, tmp_path):
    def refused(built: DiffusionModel, process: NoiseProcess, says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            export_pipeline(built, process, SIZE, tmp_path / "out", sampling())
        assert not (tmp_path / "out").exists()

    refused(model(kl(), bert(tokenizer_folder, hide_padding=True)), LDM(), "hide_padding=true")
    refused(model(Identity(), bert(tokenizer_folder)), LDM(), "needs a UNet and a KL first stage")
    refused(model(kl(), bert(tokenizer_folder)), flow(), "no pipeline for UNet with TextCondition and FlowM")
    refused(model(kl(), bert(tokenizer_folder)), edm(), "no pipeline for UNet with TextCondition and EDM")
    refused(model(kl(), classes()), flow(target="x0"), "no scheduler for FlowMatching with")
    refused(model(kl(), NoCondition(), "dit"), LDM(), "up to 1000 classes as its only condition")
    for clip, built, process, says in (
        (clipping(), model(kl(), bert(tokenizer_folder)), LDM(), "set sampler.clip=null"),
        (clipping(), model(Identity(), classes(32)), flow(), "scheduler for flow matching cannot clip"),
        (
            clipping(limit=2.0, percentile=0.9),
            model(Identity(), NoCondition()),
            LDM(),
            "this run has sampler.clip.limit=2",
        ),
    ):
        with pytest.raises(ConfigError, match=says):
            export_pipeline(built, process, SIZE, tmp_path / "out", sampling(clip))
        assert not (tmp_path / "out").exists()
    refused_settings: list[tuple[dict[str, Any], str]] = [
        ({"spacing": "leading"}, "with sampler.spacing=leading; export with sampler=ddim and set .*=trailing"),
        ({"guidance": GuidanceConfig(2.0, [0, 500])}, "with sampler.guidance.interval; export with"),
        ({"guidance": GuidanceConfig(0.5)}, "with sampler.guidance.scale=0.5; export with"),
    ]
    for settings, says in refused_settings:
        with pytest.raises(ConfigError, match=says):
            text = model(kl(), bert(tokenizer_folder))
            export_pipeline(text, LDM(), SIZE, tmp_path / "out", sampling(**settings))
    with pytest.raises(ConfigError, match="pixel space"):
        export_first_stage(Identity(), tmp_path / "out")


RUNS = {
    "leading": (diffusion, {"spacing": "leading"}),
    "leading, v": (partial(diffusion, target="v"), {"spacing": "leading", "guidance": GuidanceConfig(2.0)}),
    "rescaled guidance": (partial(diffusion, target="x0"), {"guidance": GuidanceConfig(3.0, rescale=0.7)}),
    "guidance in an interval": (LDM, {"guidance": GuidanceConfig(3.0, interval=[300, 700])}),
    "less than the condition": (LDM, {"guidance": GuidanceConfig(0.5)}),
    "noise": (LDM, {"eta": 0.6}),
    "ddpm": (partial(diffusion, target="v", zero_terminal_snr=True, **SCALED), {"name": "ddpm"}),
    "euler": (partial(diffusion, schedule="cosine", target="v"), {"name": "euler"}),
    "dpmpp_2m": (LDM, {"name": "dpmpp_2m", "steps": 7, "guidance": GuidanceConfig(2.0)}),
    "dpmpp_2m, x0": (partial(diffusion, target="x0"), {"name": "dpmpp_2m"}),
    "flow in an interval": (partial(flow, shift=3.0), {"guidance": GuidanceConfig(2.0, interval=[100, 800])}),
    "edm in an interval": (edm, {"guidance": GuidanceConfig(2.0, interval=[-300, 300]), "name": "euler"}),
    "edm, dpmpp_2m": (partial(edm, sigma_data=0.5), {"name": "dpmpp_2m", "steps": 7}),
}


@pytest.mark.parametrize("case", RUNS)
@torch.no_grad()
def test_a_call_without_settings_samples_as_the_run_does(tmp_path, case):
    make, settings = RUNS[case]
    built, process, sampler = model(Identity(), classes(32)), make(), sampling(**settings)
    export_pipeline(built, process, SIZE, tmp_path, sampler)
    pipeline = load(DiffusionPipeline, tmp_path, trust_remote_code=True)
    given, null = built.conditioner({"labels": torch.tensor([2, 0])}), built.conditioner.null(2, "cpu")
    rng = torch.Generator().manual_seed(3)
    latents = sampler(built, process, noise(built, 2), condition=given, null=null, rng=rng)
    options = {"generator": torch.Generator().manual_seed(3), "latents": noise(built, 2), "output_type": "pt"}
    theirs, ours = pipeline(["red fox", "cat"], **options).images, (latents / 2 + 0.5).clamp(0, 1)
    assert ours.std() > 0.05 and (theirs - ours).abs().max() < 1 / 255
    other = sampling(name="heun", steps=sampler.config.steps)(built, process, noise(built, 2), condition=given)
    assert ((other / 2 + 0.5).clamp(0, 1) - ours).abs().max() > 4 / 255


@torch.no_grad()
def test_a_transformer_whose_classes_are_numbers_is_not_dit(tmp_path):
    conditioner = ClassCondition(ClassConditionConfig(classes=[3, 5, 7], width=12))
    export_pipeline(model(kl(), conditioner, "dit"), LDM(), SIZE, tmp_path, sampling())
    pipeline = load(DiffusionPipeline, tmp_path, trust_remote_code=True)
    options = {"output_type": "pt", "num_inference_steps": 1}
    (five, same_five), (seven, _) = (
        pipeline(asked, generator=torch.Generator().manual_seed(7), **options).images for asked in ([5, "5"], [7, 7])
    )
    assert same_five.shape == five.shape and not torch.equal(five, seven)
    assert pipeline._numbers([5, "7"], 1) == [1, 2]
    with pytest.raises(ValueError, match="There is no class '1'; the classes are 3, 5, 7"):
        pipeline([1])


@pytest.mark.parametrize(
    ("process", "settings", "says"),
    [
        (diffusion, {"spacing": "linspace"}, r"does not fit spacing=linspace; .* sampler.spacing=trailing steps=5"),
        (diffusion, {"steps": 7}, r"does not fit 7 steps; export with sampler=ddim .* steps=8"),
        (diffusion, {"name": "heun"}, r"does not take the steps of sampler heun; export with another one"),
        (diffusion, {"name": "ddpm", "variance": "forward"}, r"sampler ddpm with variance=forward"),
        (
            diffusion,
            {"name": "dpmpp_2m", "spacing": "leading"},
            r"sampler dpmpp_2m with spacing=leading",
        ),
        (
            partial(diffusion, target="v", zero_terminal_snr=True),
            {"name": "dpmpp_2m"},
            r"dpmpp_2m with zero_terminal_snr=true",
        ),
        (diffusion, {"name": "dpmpp_2m", "clip": clipping()}, r"cannot clip to a fixed range"),
        (flow, {"name": "heun"}, r"the sampler is heun; export with sampler=euler"),
        (flow, {"eta": 1.0}, r"the sampler is ddim with eta=1"),
        (edm, {"name": "heun"}, r"without noise and clip; export with sampler=euler sampler.clip=null"),
        (edm, {"name": "dpmpp_2m", "clip": clipping(percentile=0.9)}, r"export with sampler=dpmpp_2m"),
        (partial(diffusion, schedule="cosine", timesteps=20), {"steps": 50}, r"steps=50 must lie in 1 … 20"),
    ],
)
def test_a_sampler_that_diffusers_does_not_have_is_refused(process, settings, says):
    settings = dict(settings)
    with pytest.raises(ConfigError, match=says):
        scheduler(process(), sampling(settings.pop("clip", None), **settings))
