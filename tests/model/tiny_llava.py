"""Tiny LLaVA checkpoints with the file names, config keys and tensor names of the published ones."""

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
)

from tests.tiny_tokenizers import CORPUS

TOKENS, PADDED = 400, 448
"""Of Vicuna's tokenizer 32,000, and the port pads to 32,064."""
IMAGE_TOKEN, PAD = TOKENS, TOKENS + 1
SIDE, PATCH, LAYERS = 32, 8, 3
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "image_size": SIDE, "patch_size": PATCH, "projection_dim": 32,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip
PINPOINTS = [[rows * SIDE, columns * SIDE] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
TILED: dict[str, Any] = {
    "architectures": ["LlavaMistralForCausalLM"], "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [pair[::-1] for pair in PINPOINTS], "mm_patch_merge_type": "spatial_unpad",
}  # fmt: skip
"""Fields of LLaVA-NeXT's own config, which states width and height."""
# As llava-hf/llava-1.5-7b-hf has it.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}{% for content in "
    "message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@cache
def sentences() -> bytes:
    """A sentencepiece model as Llama's: byte pairs with a fallback to bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=TOKENS, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=True, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def slow_tokenizer(folder: Path) -> None:
    """The files of Vicuna's tokenizer: `tokenizer.model`, and no `tokenizer.json`."""
    write(
        folder / "tokenizer_config.json",
        {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "LlamaTokenizer", "legacy": False,
         "model_max_length": 2048, "padding_side": "right", "pad_token": None},
    )  # fmt: skip
    write(folder / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    (folder / "tokenizer.model").write_bytes(sentences())


def tiny_model(act: str = "gelu", seed: int = 0) -> LlavaForConditionalGeneration:
    """The port's model with random values that fp16 holds, large enough that the image changes the answer."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT, vocab_size=PADDED, initializer_range=0.2),
        image_token_index=IMAGE_TOKEN,
        projector_hidden_act=act,
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    return _drawn(LlavaForConditionalGeneration, config, seed)


def tiny_next() -> Any:
    """The same with tiles, and with the language model of llava-hf/llava-v1.6-mistral-7b-hf."""
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=MistralConfig(**TEXT, vocab_size=PADDED, initializer_range=0.2),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=(SIDE // PATCH) ** 2,
        image_grid_pinpoints=PINPOINTS,
    )
    return _drawn(LlavaNextForConditionalGeneration, config, 0)


def _drawn(kind: Any, config: Any, seed: int) -> Any:
    """A model of a config with random values that fp16 holds."""
    torch.manual_seed(seed)
    model = kind(config)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "language" not in name:
            torch.nn.init.normal_(weight, std=0.2)
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):  # as the port's converter fills its rows
            weight.data[TOKENS:] = weight.data[:TOKENS].mean(0)
        weight.data = weight.data.half().float()
    return model.eval()


def parts_of(model: LlavaForConditionalGeneration) -> dict[str, dict[str, Tensor]]:
    """Part → tensors in fp16, by the names in the part alone; the tower's as those of earlier versions."""
    parts: dict[str, dict[str, Tensor]] = {"vision": {}, "connector": {}, "language": {}, "newline": {}}
    for name, value in model.state_dict().items():
        value = value.half()
        if name == "model.image_newline":
            parts["newline"]["image_newline"] = value
            continue
        if name.startswith("model.vision_tower."):
            parts["vision"][
                f"vision_model.{name.removeprefix('model.vision_tower.').removeprefix('vision_model.')}"
            ] = value
        elif name.startswith("model.multi_modal_projector."):
            parts["connector"][name.removeprefix("model.multi_modal_projector.")] = value
        else:
            parts["language"][name.replace("model.language_model.", "model.")] = value
    return parts


def shards(folder: Path, tensors: dict[str, Tensor], stem: str, count: int = 2) -> None:
    """Write tensors as the shards of a checkpoint, with its index."""
    end = "safetensors" if stem == "model" else "bin"
    names, places = sorted(tensors), {}
    for n in range(count):
        file = f"{stem}-{n + 1:05d}-of-{count:05d}.{end}"
        chosen = {name: tensors[name].contiguous() for name in names[n::count]}
        places |= dict.fromkeys(chosen, file)
        if end == "bin":
            torch.save(chosen, folder / file)
        else:
            save_file(chosen, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(value.nbytes for value in tensors.values())}, "weight_map": places}
    write(folder / f"{stem}.{end}.index.json", index)


def port(folder: Path, model: LlavaForConditionalGeneration, names: str = "old") -> Path:
    """llava-hf/llava-1.5-7b-hf: `LlavaForConditionalGeneration`; `names` of transformers 4 (old), or 5 in memory."""
    parts, sign = parts_of(model), {"old": "language_model.", "new": ""}[names]
    language = {f"{sign}{name}": value for name, value in parts["language"].items()}
    if names == "new":
        language = {
            name.replace("model.", "model.language_model.", 1) if "head" not in name else name: value
            for name, value in language.items()
        }
    before = "" if names == "old" else "model."
    vision = {f"{before}vision_tower.{name}": value for name, value in parts["vision"].items()}
    connector = {f"{before}multi_modal_projector.{name}": value for name, value in parts["connector"].items()}
    write(folder / "config.json", {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": IMAGE_TOKEN,
        "model_type": "llava", "pad_token_id": PAD, "projector_hidden_act": model.config.projector_hidden_act,
        "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
                        "model_type": "llama", "torch_dtype": "float16", "vocab_size": PADDED, **TEXT},
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.36.0.dev0",
        "vision_config": {**VISION, "model_type": "clip_vision_model", "vocab_size": 32000},
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": PADDED,
    })  # fmt: skip
    shards(folder, {**language, **vision, **connector}, "model", 3)
    slow_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>", "<pad>"], special_tokens=True)
    tokenizer.pad_token = "<pad>"
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    write(folder / "processor_config.json", {"image_token": "<image>", "patch_size": PATCH,
                                             "processor_class": "LlavaProcessor",
                                             "vision_feature_select_strategy": "default"})  # fmt: skip
    write(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    return folder


def next_port(folder: Path, model: Any) -> Path:
    """llava-hf/llava-v1.6-mistral-7b-hf, with the names of transformers 4."""
    port(folder, model)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next"}
    config |= {"image_grid_pinpoints": PINPOINTS, "use_image_newline_parameter": True}
    config["text_config"] |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    write(path, config)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    save_file({**parts_of(model)["newline"]}, folder / "newline.safetensors", {"format": "pt"})
    index["weight_map"]["image_newline"] = "newline.safetensors"
    write(folder / "model.safetensors.index.json", index)
    square = {"height": SIDE, "width": SIDE}
    processor = {"crop_size": square, "size": {"shortest_edge": SIDE}, "do_center_crop": True, "do_pad": True}
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    processor |= {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": PINPOINTS}
    write(folder / "preprocessor_config.json", {**processor, "image_mean": mean, "image_std": std})
    template = CHAT_TEMPLATE.split("{% if message")[0] + (
        "{% if message['role'] == 'user' %}{{ '[INST] ' }}{% for content in message['content'] %}{% if "
        "content['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ content['text'] + ' ' }}{% endif %}{% endfor %}"
        "{{ '[/INST]' }}{% else %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
    )
    write(folder / "chat_template.json", {"chat_template": template})
    return folder


def tower(folder: Path, model: LlavaForConditionalGeneration) -> Path:
    """openai/clip-vit-large-patch14-336, its vision tower."""
    vision = CLIPVisionModel(CLIPVisionConfig(**VISION))
    vision.load_state_dict(model.model.vision_tower.state_dict())
    vision.half().save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def own_config(tower: Path | str, linear: bool = False, **changes: Any) -> dict[str, Any]:
    """config.json of liuhaotian/llava-v1.5-7b."""
    return {
        "_name_or_path": "llava-v1.5-7b", "architectures": ["LlavaLlamaForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False, "hidden_act": "silu",
        "image_aspect_ratio": "pad", "initializer_range": 0.02, "mm_hidden_size": VISION["hidden_size"],
        "mm_projector_type": "linear" if linear else "mlp2x_gelu", "mm_resampler_type": None,
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2, "mm_vision_tower": str(tower), "model_type": "llava", "pad_token_id": 0,
        "pretraining_tp": 1, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.31.0", "tune_mm_mlp_adapter": False, "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": False, "use_cache": True, "use_mm_proj": True, "vocab_size": TOKENS, **TEXT,
        **changes,
    }  # fmt: skip


def own_projector(model: LlavaForConditionalGeneration, before: str = "model.") -> dict[str, Tensor]:
    """The projector by LLaVA's names; of a model with act=linear the first layer alone."""
    weights, linear = parts_of(model)["connector"], model.config.projector_hidden_act == "linear"
    places = {"linear_1": "" if linear else "0.", "linear_2": "2."}
    return {
        f"{before}mm_projector.{places[layer]}{kind}": weights[f"{layer}.{kind}"]
        for layer in (["linear_1"] if linear else places)
        for kind in ("weight", "bias")
    }


def own_language(model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """The language model's tensors without the port's rows."""
    rows = ("embed_tokens.weight", "lm_head.weight")
    return {n: v[:TOKENS] if n.endswith(rows) else v for n, v in parts_of(model)["language"].items()}


def own(
    folder: Path, model: LlavaForConditionalGeneration, tower: Path | str, with_tower: bool = False, **changes: Any
) -> Path:
    """liuhaotian/llava-v1.5-7b, in shards of `pytorch_model.bin`; with act=linear LLaVA v1's projector."""
    write(folder / "config.json", own_config(tower, model.config.projector_hidden_act == "linear", **changes))
    tensors = {**own_language(model), **own_projector(model)}
    tensors |= {f"model.{name}": value for name, value in parts_of(model)["newline"].items()}
    if with_tower:
        tensors |= {f"model.vision_tower.vision_tower.{n}": v for n, v in parts_of(model)["vision"].items()}
    shards(folder, tensors, "pytorch_model")
    write(folder / "generation_config.json", {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2,
                                              "pad_token_id": 0, "transformers_version": "4.31.0"})  # fmt: skip
    slow_tokenizer(folder)
    return folder


def base(folder: Path, model: LlavaForConditionalGeneration) -> Path:
    """lmsys/vicuna-7b-v1.5: `pytorch_model.bin` and `tokenizer.model`."""
    fields = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16"}
    write(folder / "config.json", {**fields, **TEXT, "vocab_size": TOKENS, "bos_token_id": 1, "eos_token_id": 2})
    shards(folder, own_language(model), "pytorch_model")
    slow_tokenizer(folder)
    return folder


def lora(folder: Path, model: LlavaForConditionalGeneration, tower: Path | str, base: Path | str) -> Path:
    """liuhaotian/llava-v1.5-7b-lora: adapter and `non_lora_trainables.bin`."""
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    write(folder / "config.json", own_config(tower, mm_projector_lr=2e-5, model_type="llava_llama"))
    write(folder / "adapter_config.json", {
        "auto_mapping": None, "base_model_name_or_path": str(base), "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
        "lora_alpha": 16, "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA", "r": 4, "revision": None,
        "target_modules": list(layers), "task_type": "CAUSAL_LM",
    })  # fmt: skip
    drawn, adapter = torch.Generator().manual_seed(3), {}
    for name, weight in own_language(model).items():
        if name.removesuffix(".weight").rpartition(".")[2] in layers:
            before = f"base_model.model.{name.removesuffix('.weight')}"
            adapter[f"{before}.lora_A.weight"] = (0.1 * torch.randn(4, weight.shape[1], generator=drawn)).half()
            adapter[f"{before}.lora_B.weight"] = (0.1 * torch.randn(len(weight), 4, generator=drawn)).half()
    torch.save(adapter, folder / "adapter_model.bin")
    torch.save(own_projector(model, "base_model.model.model."), folder / "non_lora_trainables.bin")
    return folder


def projector(folder: Path, model: LlavaForConditionalGeneration, tower: Path | str, base: Path | str) -> Path:
    """liuhaotian/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5: `mm_projector.bin`."""
    changes = {"_name_or_path": str(base), "image_aspect_ratio": "square", "tune_mm_mlp_adapter": True}
    write(folder / "config.json", own_config(tower, **changes))
    torch.save(own_projector(model), folder / "mm_projector.bin")
    return folder


def saved_port(folder: Path, text: Any, vision: Any, **fields: Any) -> LlavaForConditionalGeneration:
    """A port as this version of transformers saves it, of any language model and tower."""
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, **fields)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    slow_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>", "<pad>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return model
