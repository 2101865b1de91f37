"""`mmlab export`, as a user types it; the numbers are compared in tests/export."""

from pathlib import Path

import diffusers
import pytest
import torch

from mmlab import cli
from mmlab.config.build import build
from mmlab.diffusion.config import SamplerConfig
from mmlab.diffusion.samplers import Sampler
from mmlab.stage.assembly import restore
from tests.evaluate.tiny_scores import contrastive_run, diffusion_run, first_stage_run, make_run


@pytest.fixture(scope="module")
def work(tmp_path_factory, tokenizer_folder) -> Path:
    root = tmp_path_factory.mktemp("work")
    contrastive_run(root / "runs", tokenizer_folder)
    first_stage_run(root / "runs")
    diffusion_run(root / "runs")
    return root


def export(work, monkeypatch, capsys, *argv: str) -> tuple[int, str, str]:
    monkeypatch.chdir(work)
    code = cli.main(["export", *argv])
    out, err = capsys.readouterr()
    return code, out.strip(), err.strip()


@torch.no_grad()
def test_a_first_stage(work, monkeypatch, capsys):
    code, line, err = export(work, monkeypatch, capsys, "run=first_stage", "to=diffusers", "out=vae")
    assert (code, line) == (0, 'AutoencoderKL.from_pretrained("vae")'), err
    vae = eval(line, {"AutoencoderKL": diffusers.AutoencoderKL})
    model, _ = restore(work / "runs" / "first_stage")
    x = torch.rand(1, 3, 8, 8)
    ours = model.first_stage.normalized(model.first_stage.encode(x).mean)
    torch.testing.assert_close(vae.encode(x).latent_dist.mean, ours, rtol=1e-4, atol=1e-5)
    assert (ours - model.first_stage.encode(x).mean).abs().max() > 0.01


@torch.no_grad()
def test_a_diffusion_model_with_the_statistics_of_the_run_it_started_from(work, monkeypatch, capsys):
    code, line, err = export(work, monkeypatch, capsys, "run=denoiser")
    told = "call it with num_inference_steps=2, guidance_scale=1.0, as the run samples"
    assert (code, line) == (0, f'DiTPipeline.from_pretrained("runs/denoiser/export/diffusers")  # {told}'), err
    pipeline = eval(line, {"DiTPipeline": diffusers.DiTPipeline})
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer.config.sample_size == 4
    assert pipeline.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    model, cfg = restore(work / "runs" / "denoiser")
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    condition = model.conditioner({"labels": torch.tensor([1])})
    latents = Sampler(SamplerConfig(name="ddim", steps=4))(
        model, build(cfg.process), x, condition=condition, null=model.conditioner.null(1, "cpu")
    )
    ours = (model.first_stage.decode(model.first_stage.raw(latents)) / 2 + 0.5).clamp(0, 1)
    asked = {"guidance_scale": 1.0, "num_inference_steps": 4, "output_type": "pt"}
    theirs = pipeline(pipeline.get_label_ids(["square"]), generator=torch.Generator().manual_seed(3), **asked).images
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_a_model_of_pixels_keeps_the_clip_of_its_sampler(work, monkeypatch, capsys):
    overrides = ["model=diffusion", "model/denoiser=unet_tiny", "data=emoji", "stage=latent_diffusion", "data.size=8"]
    sampler = ["process=cosine_v", "sampler=ddim", "sampler/clip=pixels", "sampler.clip.limit=1.5"]
    make_run(work / "runs", "pixels", [*overrides, *sampler], ["denoiser"])
    code, line, err = export(work, monkeypatch, capsys, "run=pixels")
    assert code == 0 and line.startswith("DDIMPipeline"), err
    pipeline = eval(line, {"DDIMPipeline": diffusers.DDIMPipeline})
    assert pipeline.scheduler.config.clip_sample and pipeline.scheduler.config.clip_sample_range == 1.5


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["run=eye"],
            "runs/eye cannot be exported; transformers takes runs that write text, diffusers those of "
            "stage=autoencoder, latent_diffusion and code_prior.",
        ),
        (["run=denoiser", "to=transformers"], "runs/denoiser cannot be exported to transformers; set to=diffusers."),
        (["run=denoisr"], "There is no run 'denoisr' in runs. Did you mean 'denoiser'?"),
        (["run=denoiser", "to=difusers"], "'to' cannot be 'difusers'. Did you mean 'diffusers'?"),
        (["run=denoiser", "out=runs"], "runs is not empty; choose another out"),
        (["run=denoiser", "out=runs/denoiser/config.yaml"], "config.yaml is a file; give a folder as out="),
        ([], "'run' has no value; give run="),
    ],
)
def test_a_mistake_is_one_sentence(work, monkeypatch, capsys, argv, says):
    code, _, err = export(work, monkeypatch, capsys, *argv)
    assert code == 2 and says in err and "\n" not in err


def test_it_is_listed(capsys):
    assert cli.main([]) == 0
    assert (
        "export       Write a trained run as a folder that diffusers and transformers load." in capsys.readouterr().out
    )
