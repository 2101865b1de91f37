"""A tiny Llama as a GGUF file, written as llama.cpp converts one."""

import json
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

HEADS, GROUPS, LAYERS = 4, 2, 2
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
CHAT = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def write_gguf(path: Path, tokenizer: PreTrainedTokenizerFast, packed: bool = False) -> dict[str, Tensor]:
    """Write a model with random weights, which are returned; `packed` rounds its matrices to 4 bits (Q4_1).

    Its embeddings are tied, and its tokenizer is byte-level BPE.
    """
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "max_position_embeddings": 128}
    size |= {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "vocab_size": len(tokenizer)}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", tie_word_embeddings=True, **size))
    writer = GGUFWriter(path, "llama")
    _write_fields(writer, tokenizer)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        place = OUTER.get(name) or _place(name)
        values = _paired(name, weight).contiguous().numpy()
        if packed and values.ndim == 2:
            kind = GGMLQuantizationType.Q4_1
            writer.add_tensor(place, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(place, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.state_dict()


def _write_fields(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(64 // HEADS)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    special = set(tokenizer.all_special_tokens)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_vocab_size(len(tokens))
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)  # type: ignore[arg-type]
    writer.add_eos_token_id(tokenizer.eos_token_id)  # type: ignore[arg-type]
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT)


def _place(name: str) -> str:
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def _paired(name: str, weight: Tensor) -> Tensor:
    """llama.cpp rotates neighboring values of queries and keys, transformers those half a head apart."""
    heads = HEADS if "q_proj" in name else GROUPS if "k_proj" in name else 0
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape_as(weight) if heads else weight
