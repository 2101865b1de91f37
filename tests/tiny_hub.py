"""Folders with exactly the file names and config keys of published parts on the hub; tiny inside."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Blip2ForConditionalGeneration, PreTrainedModel
from transformers.utils import logging

from tests.tiny_tokenizers import sentencepiece_model

TOKENS = 360
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


def add_json(folder: Path, **files: Any) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def publish(
    folder: Path,
    model: PreTrainedModel,
    config: dict[str, Any],
    kinds: tuple[str, ...],
    shards: int = 1,
    dtype: torch.dtype = torch.float16,
    **extra: Tensor,
) -> None:
    """Write weights under the names of the hub, each kind (`safetensors`, `bin`) whole or in shards, and the config."""
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tensors = {name: weight.to(dtype).clone() for name, weight in load_file(folder / "model.safetensors").items()}
    for path in folder.iterdir():
        path.unlink()
    tensors |= extra
    add_json(folder, config=config)
    for kind in kinds:
        stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
        names = sorted(tensors)
        files = (
            [f"{stem}-{i + 1:05}-of-{shards:05}.{kind}" for i in range(shards)] if shards > 1 else [f"{stem}.{kind}"]
        )
        parts = {file: {name: tensors[name] for name in names[i::shards]} for i, file in enumerate(files)}
        for file, part in parts.items():
            if kind == "safetensors":
                save_file(part, folder / file, metadata={"format": "pt"})
            else:
                torch.save(part, folder / file)
        if shards > 1:
            places = {name: file for file, part in parts.items() for name in part}
            index = {"metadata": {"total_size": sum(each.nbytes for each in tensors.values())}, "weight_map": places}
            add_json(folder, **{f"{stem}.{kind}.index": index})


def _llama(folder: Path, config: dict[str, Any], kinds: tuple[str, ...], shards: int, inverse: bool) -> None:
    """A language model of fp16 and its `tokenizer.model`; older transformers saved the rotary frequencies, too."""
    keys = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "llama",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": TOKENS,
        **LLAMA,
        **config,
    }
    fields = {key: value for key, value in keys.items() if key not in ("architectures", "torch_dtype", "model_type")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(keys["model_type"], **fields))
    frequencies = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8, dtype=torch.float16)
        for i in range(LLAMA["num_hidden_layers"] * inverse)
    }
    publish(folder, model, keys, kinds, shards, **frequencies)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(TOKENS))
    (folder / "README.md").write_text("---\ninference: false\n---\n")


def _token(content: str) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def _tokenizer(folder: Path, config: dict[str, Any], special: dict[str, Any]) -> None:
    tokens = {f"{name}_token": _token(text) for name, text in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))}
    typed = {key: {"__type": "AddedToken", **value} for key, value in tokens.items()}
    keys = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "pad_token": None,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **typed,
        **config,
    }
    add_json(folder, tokenizer_config=keys, special_tokens_map={**tokens, **special})


def vicuna_v15(folder: Path, shards: int) -> None:
    """lmsys/vicuna-{7b,13b}-v1.5."""
    config = {
        "_name_or_path": folder.name,
        "max_position_embeddings": 4096,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "transformers_version": "4.31.0",
    }
    _llama(folder, config, ("bin",), shards, inverse=True)
    # A temperature without do_sample: transformers 4 refuses to save it.
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "max_length": 4096}
    generation |= {"pad_token_id": 0, "temperature": 0.9, "top_p": 0.6, "transformers_version": "4.31.0"}
    add_json(folder, generation_config=generation)
    _tokenizer(folder, {"legacy": False, "model_max_length": 4096, "padding_side": "right"}, {"pad_token": "<unk>"})


def vicuna_v13(folder: Path, shards: int) -> None:
    """lmsys/vicuna-{7b,13b}-v1.3: with the keys of an earlier transformers, and no `legacy`."""
    config = {
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "transformers_version": "4.28.1",
    }
    _llama(folder, config, ("bin",), shards, inverse=True)
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    add_json(folder, generation_config={**generation, "transformers_version": "4.28.1"})
    _tokenizer(folder, {"model_max_length": 2048}, {"pad_token": "<unk>"})


def vicuna_v0(folder: Path, shards: int) -> None:
    """Vision-CAIR/vicuna and vicuna-7b: one token more, [PAD], beside `tokenizer.model`."""
    config = {"max_position_embeddings": 2048, "pad_token_id": 0, "rms_norm_eps": 1e-06, "vocab_size": TOKENS + 1}
    _llama(folder, {**config, "transformers_version": "4.28.0.dev0"}, ("bin",), shards, inverse=True)
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    add_json(folder, generation_config={**generation, "transformers_version": "4.28.0.dev0"})
    _tokenizer(folder, {"model_max_length": 1000000000000000019884624838656}, {"pad_token": "[PAD]"})
    add_json(folder, added_tokens={"[PAD]": TOKENS})


def llama_2_chat(folder: Path, shards: int) -> None:
    """meta-llama/Llama-2-7b-chat-hf: in both kinds, with both tokenizers and a chat template."""
    config = {
        "_name_or_path": "meta-llama/Llama-2-7b-chat-hf",
        "max_position_embeddings": 4096,
        "num_key_value_heads": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "transformers_version": "4.32.0.dev0",
    }
    _llama(folder, config, ("safetensors", "bin"), shards, inverse=False)
    generation = {"bos_token_id": 1, "do_sample": True, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.6}
    add_json(folder, generation_config={**generation, "max_length": 4096, "top_p": 0.9})
    template = "{% for m in messages %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
    _tokenizer(folder, {"chat_template": template, "legacy": False, "padding_side": "right"}, {})
    from mmlab.model.pretrained_tokenizer import load_tokenizer

    load_tokenizer(str(folder)).backend_tokenizer.save(str(folder / "tokenizer.json"))


def mistral_instruct(folder: Path, shards: int) -> None:
    """mistralai/Mistral-7B-Instruct-v0.2: in both kinds, with its tokenizer's model and a chat template."""
    config = {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0",
    }
    _llama(folder, config, ("safetensors", "bin"), shards, inverse=False)
    add_json(folder, generation_config={"bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.36.0"})
    template = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
    _tokenizer(folder, {"chat_template": template, "legacy": False, "padding_side": "left"}, {})


def clip(folder: Path, pixels: int, kinds: tuple[str, ...]) -> None:
    """openai/clip-vit-large-patch14 and -336: both towers in one model, the old keys, and a processor."""
    shared = {"attention_dropout": 0.0, "dropout": 0.0, "hidden_act": "quick_gelu", "torch_dtype": None}
    text = {"model_type": "clip_text_model", "vocab_size": TOKENS, "max_position_embeddings": 77, **shared, **TOWER}
    vision = {"model_type": "clip_vision_model", "image_size": pixels, "patch_size": 14, **shared, **TOWER}
    keys = {
        "_name_or_path": f"clip-vit-large-patch14-{pixels}/",
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": 16,
        "text_config": {**text, "bos_token_id": 0, "eos_token_id": 2, "use_bfloat16": False, "is_decoder": False},
        "text_config_dict": {key: TOWER[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
        "torch_dtype": "float32",
        "transformers_version": None,
        "vision_config": {**vision, "projection_dim": 16, "pruned_heads": {}, "return_dict": True},
        "vision_config_dict": {"image_size": pixels, "patch_size": 14, **TOWER},
    }
    towers = {"text_config": keys["text_config"], "vision_config": keys["vision_config"]}
    model = AutoModel.from_config(AutoConfig.for_model("clip", projection_dim=16, **towers))
    places = {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "vision_model.embeddings.position_ids": torch.arange((pixels // 14) ** 2 + 1)[None],
    }
    publish(folder, model, keys, kinds, dtype=torch.float32, **places)
    size: dict[str, Any] = {"crop_size": pixels, "do_center_crop": True, "do_normalize": True, "do_resize": True}
    size |= {"feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": pixels}
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    add_json(folder, preprocessor_config={**size, "image_mean": mean, "image_std": std}, vocab={"a": 0})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tf_model.h5").write_bytes(b"not read")


def blip_2(folder: Path, shards: int) -> None:
    """Salesforce/blip2-flan-t5-xxl: EVA ViT-g, Q-Former and FlanT5 in one model."""
    reader = {key: value for key, value in TOWER.items() if key != "num_hidden_layers"}
    vision = {"model_type": "blip_2_vision_model", "image_size": 224, "patch_size": 14, **TOWER}
    qformer = {"model_type": "blip_2_qformer", "encoder_hidden_size": 32, "num_hidden_layers": 2, **reader}
    qformer |= {"cross_attention_frequency": 2, "vocab_size": 30523}
    text = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    keys = {
        "architectures": ["Blip2ForConditionalGeneration"],
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "model_type": "blip-2",
        "num_query_tokens": 32,
        "qformer_config": qformer,
        "text_config": {
            **text,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": None,
        "use_decoder_only_language_model": False,
        "vision_config": {"initializer_range": 0.02, **vision},
    }
    towers = {key: keys[key] for key in ("vision_config", "qformer_config", "text_config", "num_query_tokens")}
    model = Blip2ForConditionalGeneration(AutoConfig.for_model("blip-2", **towers))
    torch.nn.init.normal_(model.query_tokens)
    publish(folder, model, keys, ("bin",), shards, torch.float32)
    add_json(folder, preprocessor_config={"processor_class": "Blip2Processor", "size": {"height": 224, "width": 224}})


def siglip(folder: Path, pixels: int) -> None:
    """google/siglip-so400m-patch14-384: both towers in one model."""
    vision = {"model_type": "siglip_vision_model", "image_size": pixels, "patch_size": 14, **TOWER}
    keys = {
        "architectures": ["SiglipModel"],
        "initializer_factor": 1.0,
        "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model", "vocab_size": TOKENS, **TOWER},
        "torch_dtype": "float32",
        "transformers_version": "4.37.0.dev0",
        "vision_config": vision,
    }
    towers = {"text_config": keys["text_config"], "vision_config": vision}
    model = AutoModel.from_config(AutoConfig.for_model("siglip", **towers))
    publish(folder, model, keys, ("safetensors",), dtype=torch.float32)
    size = {"do_normalize": True, "do_rescale": True, "do_resize": True, "size": {"height": pixels, "width": pixels}}
    add_json(folder, preprocessor_config={**size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})


def dinov2(folder: Path) -> None:
    """facebook/dinov2-with-registers-large."""
    tower = {key: value for key, value in TOWER.items() if key != "intermediate_size"}
    keys = {
        "architectures": ["Dinov2WithRegistersModel"],
        "image_size": 518,
        "model_type": "dinov2_with_registers",
        "num_register_tokens": 4,
        "patch_size": 14,
        "torch_dtype": "float32",
        "transformers_version": "4.46.0.dev0",
        **tower,
    }
    fields = {key: value for key, value in keys.items() if key not in ("architectures", "torch_dtype", "model_type")}
    model = AutoModel.from_config(AutoConfig.for_model("dinov2_with_registers", **fields))
    publish(folder, model, keys, ("safetensors",), dtype=torch.float32)
    size = {"crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_normalize": True}
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    add_json(folder, preprocessor_config={**size, "image_mean": mean, "image_std": std})


PARTS = {
    "lmsys/vicuna-7b-v1.5": lambda folder: vicuna_v15(folder, 2),
    "lmsys/vicuna-13b-v1.5": lambda folder: vicuna_v15(folder, 3),
    "lmsys/vicuna-7b-v1.3": lambda folder: vicuna_v13(folder, 2),
    "lmsys/vicuna-13b-v1.3": lambda folder: vicuna_v13(folder, 3),
    "Vision-CAIR/vicuna-7b": lambda folder: vicuna_v0(folder, 2),
    "Vision-CAIR/vicuna": lambda folder: vicuna_v0(folder, 3),
    "meta-llama/Llama-2-7b-chat-hf": lambda folder: llama_2_chat(folder, 2),
    "mistralai/Mistral-7B-Instruct-v0.2": lambda folder: mistral_instruct(folder, 3),
    "openai/clip-vit-large-patch14": lambda folder: clip(folder, 224, ("safetensors", "bin")),
    "openai/clip-vit-large-patch14-336": lambda folder: clip(folder, 336, ("bin",)),
    "Salesforce/blip2-flan-t5-xxl": lambda folder: blip_2(folder, 6),
    "google/siglip-so400m-patch14-384": lambda folder: siglip(folder, 384),
    "facebook/dinov2-with-registers-large": dinov2,
}
"""Name on the hub → how to write a folder like it."""
