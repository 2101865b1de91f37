"""A diffusers pipeline for models that diffusers has none for: classes or no condition, on latents or on pixels.

This file is copied into exported folders as `pipeline.py`, which needs only torch and diffusers.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    pipe(classes=["cat", "dog"]).images  # with the run's steps and guidance
    pipe(classes=["cat", "dog"], guidance_scale=2.0).images
    pipe(count=4).images  # of an unconditional model, or of no class
"""

from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,  # pyright: ignore[reportPrivateImportUsage]
    DiffusionPipeline,  # pyright: ignore[reportPrivateImportUsage]
    EDMDPMSolverMultistepScheduler,  # pyright: ignore[reportPrivateImportUsage]
    EDMEulerScheduler,  # pyright: ignore[reportPrivateImportUsage]
    FlowMatchEulerDiscreteScheduler,  # pyright: ignore[reportPrivateImportUsage]
    ImagePipelineOutput,  # pyright: ignore[reportPrivateImportUsage]
    UNet2DConditionModel,  # pyright: ignore[reportPrivateImportUsage]
)
from diffusers.utils.torch_utils import randn_tensor
from torch.nn import functional as F

from mmlab.class_names import class_index


class LatentDiffusionPipeline(DiffusionPipeline):
    """Samples from noise, with classifier-free guidance if there are classes.

    Args:
        denoiser: UNet2DModel, UNet2DConditionModel (a class is a one-hot row as its context) or DiTTransformer2DModel.
        scheduler: DDIMScheduler, FlowMatchEulerDiscreteScheduler, EDMEulerScheduler, or others of diffusers.
        vae: AutoencoderKL or VQModel; None for pixels.
        classes: names of the classes, in the order of their numbers; none for an unconditional model.
        null_class: the number for no class.
        latents_mean, latents_std: per channel, of raw latents; None if the vae takes normalized ones.
        defaults: of the arguments of a call.
        time_scale: from the scheduler's times to the denoiser's.
    """

    _optional_components = ["vae"]
    model_cpu_offload_seq = "denoiser->vae"

    def __init__(
        self,
        denoiser,
        scheduler,
        vae=None,
        classes=None,
        null_class=None,
        latents_mean=None,
        latents_std=None,
        defaults=None,
        time_scale=1,
    ):
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler, vae=vae)
        self.register_to_config(
            classes=classes,
            null_class=null_class,
            latents_mean=latents_mean,
            latents_std=latents_std,
            defaults=defaults,
            time_scale=time_scale,
        )

    @torch.no_grad()
    def __call__(
        self,
        classes=None,
        count=1,
        guidance_scale=None,
        num_inference_steps=None,
        generator=None,
        latents=None,
        output_type="pil",
        return_dict=True,
        guidance_rescale=None,
        guidance_interval=None,
        eta=None,
    ):
        """Generate images. None as guidance, steps or eta is the run's own.

        Args:
            classes: names, one image each, or positions where no name is a number.
            count: number of images of no class, if `classes` is None.
            guidance_scale: 1 is the conditional model.
            num_inference_steps: a divisor of the scheduler's timesteps, if it is DDIM's.
            generator: for the noise.
            latents: the noise itself, `[B, C, h, w]`.
            output_type: `pil`, `np` or `pt` (in 0 … 1).
            return_dict: False returns a tuple.
            guidance_rescale: share of the guided prediction that gets the conditional one's deviation.
            guidance_interval: lowest and highest time of the denoiser at which to guide.
            eta: of DDIM: 0 adds no noise, 1 as much as DDPM.
        """
        given = {
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
            "guidance_interval": guidance_interval,
            "num_inference_steps": num_inference_steps,
            "eta": eta,
        }
        defaults = self.config["defaults"] or {}
        settings = {name: defaults[name] if value is None else value for name, value in given.items()}
        numbers = self._numbers(classes, count)
        config, size = self.denoiser.config, self.denoiser.config.sample_size
        if latents is None:
            shape = (len(numbers), config.in_channels, size, size)
            latents = randn_tensor(shape, generator, self._execution_device, self.denoiser.dtype)
        labels = torch.tensor(numbers, device=latents.device) if self.config["classes"] else None
        # The noise is made consistent with the clipped image, so that both still add up to the latents.
        options: Any = {}
        if isinstance(self.scheduler, DDIMScheduler):
            options = {"use_clipped_model_output": True, "eta": settings["eta"], "generator": generator}
        bar: Any = self.progress_bar
        step: Any = self.scheduler.step
        timesteps = self._timesteps(settings["num_inference_steps"], latents.device)
        # The states of these schedulers have the noise's deviation; the denoiser's input is scaled.
        scaled = isinstance(self.scheduler, EDMEulerScheduler | EDMDPMSolverMultistepScheduler)
        latents = latents * self.scheduler.init_noise_sigma if scaled else latents
        for t in bar(timesteps):
            x = self.scheduler.scale_model_input(latents, t) if scaled else latents
            prediction = self._guided(x, t * self.config["time_scale"], labels, settings)
            latents = step(prediction, t, latents, **options).prev_sample
        images = self._decode(latents).cpu()
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).float().numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images) if return_dict else (images,)  # pyright: ignore[reportArgumentType]

    def _numbers(self, classes, count):
        if classes is None:
            return [self.config["null_class"]] * count
        return [class_index(name, self.config["classes"] or []) for name in classes]

    def _timesteps(self, steps, device):
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist(), device=device)
        else:
            self.scheduler.set_timesteps(steps, device=device)
        return self.scheduler.timesteps

    def _guided(self, x, t, classes, settings):
        scale, rescale, interval = (settings[f"guidance_{name}"] for name in ("scale", "rescale", "interval"))
        outside = interval is not None and not interval[0] <= float(t) <= interval[1]
        if classes is None or scale == 1 or outside:
            return self._predict(x, t, classes)
        null = torch.full_like(classes, self.config["null_class"])
        conditional, without = self._predict(torch.cat([x, x]), t, torch.cat([classes, null])).chunk(2)
        mixed = without + scale * (conditional - without)
        if not rescale:
            return mixed
        ratio = (conditional.flatten(1).std(1) / mixed.flatten(1).std(1)).view(-1, 1, 1, 1)
        return rescale * ratio * mixed + (1 - rescale) * mixed

    def _predict(self, x, t, classes):
        t = t.expand(len(x))
        if classes is None:
            return self.denoiser(x, t).sample
        if isinstance(self.denoiser, UNet2DConditionModel):
            context = F.one_hot(classes, len(self.config["classes"]) + 1).to(x.dtype)[:, None]
            return self.denoiser(x, t, encoder_hidden_states=context).sample
        return self.denoiser(x, t, class_labels=classes).sample

    def _decode(self, latents):
        if self.config["latents_mean"] is not None:
            mean, std = (torch.tensor(c).to(latents) for c in (self.config["latents_mean"], self.config["latents_std"]))
            latents = latents * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
        pixels = latents if self.vae is None else self.vae.decode(latents).sample
        return (pixels / 2 + 0.5).clamp(0, 1)
