"""Export of a run that writes text as a folder with which transformers gives the same tokens."""

import copy
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig

from mmlab.config.errors import ConfigError
from mmlab.data.anyres import image_spec
from mmlab.data.config import Prompt
from mmlab.data.images import PAD_COLOR, picture_of
from mmlab.data.packing import Shown, place_pictures
from mmlab.data.sample_types import ImageSpec, Picture
from mmlab.data.templates import template_named
from mmlab.data.turns import IMAGE, tokenizer_name
from mmlab.export.adapters import write_adapters
from mmlab.export.chat_ids import INEXACT, LATER, SEVERAL, different_ids, exact_template, writes_bos
from mmlab.export.processors import image_processor, llava_processor
from mmlab.export.transformers_modules import add_image_token, blip2, llava
from mmlab.model.config import ANSWER_TOKENS
from mmlab.model.language import LanguageOnly
from mmlab.model.pretrained import NO_CODE, quieten
from mmlab.model.vlm import VisionLanguageModel

NO_ADAPTERS: Mapping[str, Path] = {}


def export_language(
    model: LanguageOnly, prompt: Prompt, dtype: torch.dtype, out: Path, adapters: Mapping[str, Path] = NO_ADAPTERS
) -> tuple[str, list[str]]:
    """Write a language model with its tokenizer and chat template.

    Args:
        model: the trained model.
        prompt: of questions, or of captions.
        dtype: of the weights.
        out: the folder.
        adapters: part → artifact of an adapter that the model does not contain; they are written beside it.

    Returns:
        The line that loads it, and what is different in transformers.

    Raises:
        ConfigError: prompts that transformers tokenizes differently.
    """
    causal, tokenizer = model.language.causal.to(dtype), model.language.tokenizer
    tokenizer.chat_template, inexact = exact_template(prompt, tokenizer, "", None)
    ends, notes = end_tokens(tokenizer, prompt)
    causal.generation_config = generation_config(causal, ends, tokenizer.pad_token_id)
    quieten()
    causal.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _check_tokenizer(tokenizer, AutoTokenizer.from_pretrained(out, **NO_CODE), prompt, None)
    load = f'AutoModelForCausalLM.from_pretrained("{out}")'
    if adapters:
        load = _write_adapters(adapters, model, causal, out, load)
    return f'{load}, AutoTokenizer.from_pretrained("{out}")', notes + _notes(inexact)


def export_vision_language(
    model: VisionLanguageModel,
    prompt: Prompt,
    data: Any,
    dtype: torch.dtype,
    out: Path,
    adapters: Mapping[str, Path] = NO_ADAPTERS,
) -> tuple[str, list[str]]:
    """Write a `LlavaForConditionalGeneration`, or another class of the kind.

    It is `Blip2ForConditionalGeneration` for a model with a Q-Former, and `LlavaNextForConditionalGeneration` for
    pictures of several tiles.

    Args:
        model: the trained model, whose modules become parts of what is written.
        prompt: of questions, or of captions.
        data: settings of the data that it was trained on, which say how pictures are decoded.
        dtype: of the weights.
        out: the folder.
        adapters: part → artifact of an adapter that the model does not contain; they are written beside it.

    Returns:
        The line that loads it, and what is different in transformers.

    Raises:
        ConfigError: a part that transformers' classes cannot hold, or prompts that it tokenizes differently.
    """
    model.to(dtype)
    vision: Any = model.vision
    causal, tokenizer = model.language.causal, model.language.tokenizer
    if not hasattr(vision, "tower"):
        raise ConfigError(
            f"transformers' classes cannot hold a {type(vision).__name__}; export takes a VisionEncoder, or a "
            "subclass, around one model of transformers."
        )
    spec = image_spec(model, data)
    drawn, probe = Image.linear_gradient("L").resize((spec.size, spec.size)).convert("RGB"), [1, 2, 3]
    picture = picture_of(torch.from_numpy(np.array(drawn)).permute(2, 0, 1), spec)
    ours, normalized = _logits(model, probe, picture), vision.normalize(picture.tiles)
    image_id = add_image_token(tokenizer, causal)
    images = image_processor(spec, vision.image_mean, vision.image_std)
    with vision.whole_tower() if model.qformer is None else nullcontext():
        exported = llava(model, image_id, spec) if model.qformer is None else blip2(model, image_id)
        inputs = images(drawn, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        _check_pixels(inputs["pixel_values"].flatten(0, -4), normalized, vision)
        # Large models amplify the last bits of the pixels, so both get the same ones.
        inputs["pixel_values"] = normalized.view_as(inputs["pixel_values"])
        _check(ours, exported, torch.tensor([[image_id] * len(picture.places) + probe]), inputs, vision)
        template, inexact = exact_template(prompt, tokenizer, IMAGE, spec)
        ends, notes = end_tokens(tokenizer, prompt)
        exported.generation_config = generation_config(causal, ends, tokenizer.pad_token_id)
        strategy = getattr(exported.config, "vision_feature_select_strategy", "full")
        processor = llava_processor(strategy, images, tokenizer, spec, template)
        quieten()
        exported.save_pretrained(out)
        processor.save_pretrained(out)
    again = AutoProcessor.from_pretrained(out, **NO_CODE)
    again.tokenizer.chat_template = again.chat_template
    _check_tokenizer(tokenizer, again.tokenizer, prompt, spec)
    notes += _notes(inexact) + _processor_notes(template, tokenizer, vision, spec)
    load = f'{type(exported).__name__}.from_pretrained("{out}")'
    if adapters:
        load = _write_adapters(adapters, model, exported, out, load)
    return f'{_imports(vision)}{load}, AutoProcessor.from_pretrained("{out}")', notes


def _imports(vision: Any) -> str:
    """The statements before the line that loads a tower of a user's own package."""
    modules = {type(each).__module__ for each in (vision.tower, vision.tower.config)}
    return "".join(sorted(f"import {each}; " for each in modules if not each.startswith("transformers.")))


def _write_adapters(adapters: Mapping[str, Path], model: Any, exported: Any, out: Path, load: str) -> str:
    write_adapters({path: getattr(model, part) for part, path in adapters.items()}, exported, out / "adapter")
    return f'PeftModel.from_pretrained({load}, "{out}/adapter")'


@torch.no_grad()
def _logits(model: VisionLanguageModel, probe: list[int], picture: Picture) -> torch.Tensor:
    """Our logits `[T, vocabulary]` of a picture with token ids behind it."""
    row = torch.tensor([[0] * len(picture.places) + probe])
    batch = place_pictures([Shown(picture, 0, 0)], model.tokens_per_image, picture.tiles.shape[-1])
    features = model.features(batch["pixel_values"])
    embeds = model.embed(row, features, batch["image_positions"], batch["image_features"])
    return model.language.causal(inputs_embeds=embeds, use_cache=False).logits[0].float()


def _check_pixels(processed: torch.Tensor, normalized: torch.Tensor, vision: Any) -> None:
    """Raise ConfigError unless transformers' image processor gives what the tower reads."""
    rounding = 2 / 255 / min(vision.image_std) if len(processed) > 1 else 0  # of tiles, which are resized
    tolerance = rounding + (1e-5 if normalized.dtype == torch.float32 else 1e-2)
    if not torch.allclose(processed, normalized, 1e-2, tolerance):
        raise ConfigError(
            f"transformers' image processors cannot normalize pixels as {type(vision).__name__} does, which has to be "
            "by its image_mean and image_std."
        )


@torch.no_grad()
def _check(ours: torch.Tensor, exported: Any, ids: torch.Tensor, inputs: Any, vision: Any) -> None:
    """Raise ConfigError unless the exported model gives our logits `[T, vocabulary]`."""
    kinds = f"{vision.tower.config.model_type} and {exported.config.text_config.model_type}"
    name = type(exported).__name__
    try:
        theirs = exported(input_ids=ids, **inputs, use_cache=False).logits[0].float()
    except Exception as error:  # of the tower, which transformers calls in its own way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"{name} cannot run a {kinds}: {reason}. The tower must give hidden_states with tokens [N, P, D]."
        ) from error
    difference = (ours - theirs[:, : ours.shape[1]]).abs().max() / ours.abs().max()
    if not difference < (1e-4 if exported.dtype == torch.float32 else 0.02):
        raise ConfigError(f"{name} computes other logits than this run (by {difference:.1g}) with a {kinds}.")


def _check_tokenizer(tokenizer: Any, loaded: Any, prompt: Prompt, spec: ImageSpec | None) -> None:
    """Raise ConfigError if transformers loads another tokenizer than was written, as for some types of model."""
    if not set(different_ids(prompt, tokenizer, loaded, loaded.chat_template, spec)) <= INEXACT:
        raise ConfigError(
            f"transformers loads a {type(loaded).__name__} for this type of model, which gives other token ids than "
            f"the run's tokenizer {tokenizer_name(tokenizer)}; such a run cannot be exported."
        )


def generation_config(causal: Any, ends: Collection[int], padding: int) -> GenerationConfig:
    """Return the settings with which transformers decodes as `mmlab chat`: greedily, until one of the tokens `ends`."""
    settings = copy.deepcopy(causal.generation_config)
    for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
        setattr(settings, name, None)
    settings.do_sample, settings.max_new_tokens, settings._from_model_config = False, ANSWER_TOKENS, False
    own = settings.eos_token_id
    settings.eos_token_id = sorted({*([own] if isinstance(own, int) else own or []), *ends})
    settings.pad_token_id = padding
    return settings


def end_tokens(tokenizer: Any, prompt: Prompt) -> tuple[set[int], list[str]]:
    """Return (the tokens with which an answer ends, what is different from mmlab).

    mmlab stops where the text contains the template's stop. Where that is not a special token, as LLaVA v0's "###",
    it can be any token that contains it. (`stop_strings` would break `transformers serve`, which has no tokenizer for
    them.)
    """
    template = template_named(prompt.template)
    stop = template.stop(tokenizer)
    ends = {tokenizer.eos_token_id} - {None}
    if stop == tokenizer.eos_token:
        return ends, []
    if stop in tokenizer.get_added_vocab():
        return {*ends, tokenizer.convert_tokens_to_ids(stop)}, []
    texts = tokenizer.batch_decode([[number] for number in range(len(tokenizer))])
    ends |= {number for number, text in enumerate(texts) if stop in text}
    notes = [f"the text of an answer ends with {stop!r}, which mmlab removes."]
    close = getattr(template, "close", "")
    last = {tokenizer(word + close + stop, add_special_tokens=False)["input_ids"][-1] for word in ("red", "a.", "1")}
    for number in sorted(last - ends):
        notes.append(f"answers also end at the token {texts[number]!r}, the last one of {stop!r}.")
    return ends | last, notes


def _processor_notes(template: str, tokenizer: Any, vision: Any, spec: ImageSpec) -> list[str]:
    """What a user of the processor has to know."""
    notes = []
    if writes_bos(template, tokenizer):
        notes.append("the chat template writes the BOS token: tokenize its text with add_special_tokens=False.")
    mean_color = tuple(int(mean * 255) for mean in vision.image_mean)
    if spec.aspect == "pad" and mean_color != PAD_COLOR:
        notes.append(f"pictures that are not square are padded with the color {mean_color}, not {PAD_COLOR}.")
    return notes


def _notes(inexact: list[str]) -> list[str]:
    """What is different in dialogues with other token ids."""
    later, several = ([name for name in inexact if name in kind] for kind in (LATER, SEVERAL))
    notes = [f"the prompt has other token ids in {later[0]} of a dialogue."] if later else []
    return [*notes, f"a prompt that shows {several[0]} has other token ids."] if several else notes
