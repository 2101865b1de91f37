"""Every causal language model: packed rows equal single rows, and cached answers teacher forcing; or it is refused."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from mmlab.config.errors import ConfigError
from mmlab.model.config import LanguageModelConfig
from mmlab.model.language import LanguageModel
from mmlab.model.output_loss import LINEAR
from mmlab.model.packed_rows import MASKED, ROWS, takes_masks
from tests.model.test_attention import uncompiled

WIDTH = ["hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size", "lru_width"]
LAYERS = ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"]
HEADS = ["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"]
INNER = ["intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "d_ff"]
SMALL: dict[str, Any] = {
    **dict.fromkeys(WIDTH, 32),
    **dict.fromkeys(LAYERS, 2),
    **dict.fromkeys(HEADS, 4),
    **dict.fromkeys(INNER, 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "state_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state"), 8),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "attention_window_size", "rotary_dim"), 4),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "linear_num_value_heads", "mamba_n_heads", "rank"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "n_groups"), 1),
    "mamba_n_groups": 1,
    "mamba_d_head": 16,
    "chunk_size": 4,
    "decoder_start_token_id": 1,
}
"""Fields of a small config, where a config has them. A window of four tokens is shorter than every text below."""

ALTERNATE = ["linear_attention", "full_attention"]
WINDOWS = ["sliding_attention", "full_attention"]
PERIOD = {"expert_layer_period": 2, "expert_layer_offset": 1}
OTHERS: dict[str, dict[str, Any]] = {
    # Biases of distance, built from a two-dimensional mask.
    "bloom": {},
    "mpt": {},
    "falcon with alibi": {"alibi": True, "multi_query": False, "new_decoder_architecture": False},
    # Windows and chunks of their own.
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "llama4_text": {},
    "qwen2 with windows": {"use_sliding_window": True, "layer_types": WINDOWS},
    "qwen3 with windows": {"use_sliding_window": True, "layer_types": WINDOWS},
    "qwen3_moe with windows": {"use_sliding_window": True},
    "smollm3 with windows": {"use_sliding_window": True, "layer_types": WINDOWS},
    "mistral without window": {"sliding_window": None},
    # A recurrent state.
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "falcon_mamba": {},
    "rwkv": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, **PERIOD},
    "granitemoehybrid": {"layer_types": ALTERNATE},
    "qwen3_next": {"layer_types": ALTERNATE},
    "olmo_hybrid": {"layer_types": ALTERNATE},
    "minimax": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    # Further ones that are not known to read a mask as it is.
    "deepseek_v3": {"num_key_value_heads": 4},
    "bert": {"is_decoder": True},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "t5": ({}, "'t5' is not a causal language model"),
    "bart": ({}, "'bart' cannot be used, because it has an encoder"),
    "bert": ({}, r"attends to later tokens \(is_decoder is false in its config\)"),
    "xlnet": ({}, "cannot continue embeddings"),
    "bamba": ({}, "cannot continue embeddings"),
    "openai-gpt": ({}, "cannot continue embeddings"),
    "gemma3": ({}, "has more parts than a language model"),
    "gemma3n_text": ({}, "looks up token ids in every layer"),
    "roberta": ({"is_decoder": True}, "answers otherwise with transformers' cache"),
    "moshi": ({}, "answers otherwise with transformers' cache"),
}
TENSORS = {"biogpt", "diffllama", "doge", "falcon", "gpt_bigcode", "stablelm"}
"""Of `MASKED`, those that have SDPA, and need a mask that is a tensor."""
EAGER = {"bloom", "gemma2", "gptj", "gpt_neo", "gpt_oss", "mamba", "mpt", "rwkv"}


def small(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The architecture of a model of two layers, 32 wide, without dropout."""
    config = CONFIG_MAPPING[kind]()
    default, alias = config.to_dict(), config.attribute_map
    size = {name: value for name, value in SMALL.items() if name in default and alias.get(name) not in SMALL}
    none = {name: 0.0 for name, value in default.items() if "drop" in name and isinstance(value, float)}
    return {"model_type": kind, **none, **size, **fields}


def language(tokenizer: Any, name: str, fields: dict[str, Any]) -> LanguageModel:
    """A model whose every weight matters."""
    torch.manual_seed(0)
    config = LanguageModelConfig(init="random", architecture=small(name.split()[0], fields), tokenizer=str(tokenizer))
    model = LanguageModel(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, 0, 0.15)
    return model


def alone(model: LanguageModel, ids: list[int]) -> Tensor:
    """The logits of one text in a row of its own, `[T, V]`."""
    row = torch.tensor([ids])
    one = torch.ones_like(row)
    return model(model.embed(row), one.bool(), one, one - 1, torch.arange(len(ids))[None], packed=False)


IMAGE, FIRST, SECOND, OTHER = [30, 31, 32, 33, 34], [5, 6, 7, 8, 9, 10, 11], [20, 21, 22, 23], [40, 41, 42, 43, 44, 45]


def packed_equal_single(model: LanguageModel) -> None:
    """A row of two questions about one image and another text, and a shorter row."""
    lengths = [len(IMAGE), len(FIRST), len(SECOND), len(OTHER)]
    ids = torch.zeros(2, sum(lengths) + 2, dtype=torch.int64)
    segments, contexts, places = torch.zeros_like(ids), torch.zeros_like(ids), torch.zeros_like(ids)
    rows = [[(IMAGE, 0, 0), (FIRST, 1, 5), (SECOND, 1, 5), (OTHER, 0, 0)], [(OTHER, 0, 0), (FIRST, 0, 0)]]
    for r, row in enumerate(rows):
        at = 0
        for number, (text, context, start) in enumerate(row, 1):
            part = slice(at, at := at + len(text))
            ids[r, part], segments[r, part] = torch.tensor(text), number
            contexts[r, part], places[r, part] = context, torch.arange(start, start + len(text))
    keep = segments > 0
    keep[0, 0] = False
    packed = model(model.embed(ids), keep, segments, contexts, places, packed=True)
    image, first = alone(model, IMAGE), alone(model, IMAGE + FIRST)[len(IMAGE) :]
    second = alone(model, IMAGE + SECOND)[len(IMAGE) :]
    single = torch.cat([image[1:], first, second, alone(model, OTHER), alone(model, OTHER), alone(model, FIRST)])
    assert torch.allclose(packed, single, atol=1e-5 * float(single.abs().max().clamp(min=1)))


def cached_equal_teacher_forcing(model: LanguageModel) -> None:
    """Two prompts of different length, continued together; each new token has the largest logit."""
    prompts = [FIRST + OTHER, SECOND]
    ids, mask = torch.zeros(2, 13, dtype=torch.int64), torch.zeros(2, 13, dtype=torch.int64)
    for r, prompt in enumerate(prompts):
        ids[r, -len(prompt) :], mask[r, -len(prompt) :] = torch.tensor(prompt), 1
    # Without an end of text: all tokens are compared.
    new = model.generate(model.embed(ids), mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for prompt, answer in zip(prompts, new.tolist(), strict=True):
        logits = alone(model, prompt + answer)[len(prompt) - 1 : -1]
        assert torch.allclose(logits.max(1)[0], logits[range(4), answer], atol=1e-4)


def gradients_reach_every_token(model: LanguageModel) -> None:
    row = torch.tensor([FIRST])
    embeds, one = model.embed(row).detach().requires_grad_(), torch.ones_like(row)
    model(embeds, one.bool(), one, one - 1, torch.arange(len(FIRST))[None], packed=False).square().mean().backward()
    assert embeds.grad is not None and embeds.grad.isfinite().all() and embeds.grad[0].abs().sum(1).gt(0).all()


def forced_to(kind: str, model: Any, wanted: str, packed: bool, embeds_BTD: Tensor) -> str:
    return kind if packed else "plain"


def chunks_equal_logits(model: LanguageModel) -> None:
    """The loss by chunks of positions, and its gradients; the last token of the row has none."""
    row = torch.tensor([FIRST + OTHER])
    one, keep, targets = torch.ones_like(row), torch.ones_like(row).bool(), row[0].roll(-1)[:-1]
    keep[0, -1] = False
    results = []
    for model.settings.loss in ("logits", "chunked"):
        embeds = model.embed(row).detach().requires_grad_()
        places = torch.arange(row.shape[1])[None]
        loss = model.cross_entropy(embeds, keep, targets, one, one - 1, places, packed=False)
        head = model.causal.get_output_embeddings().weight
        results.append([loss, *torch.autograd.grad(loss, [embeds, head])])
    for plain, chunked in zip(*results, strict=True):
        assert torch.allclose(plain, chunked, rtol=1e-4, atol=1e-4 * float(plain.detach().abs().max()))
    assert any(way.startswith("loss of the language model: by chunks") for way in model.ways)


@pytest.mark.parametrize("name", [*sorted(MASKED & set(CONFIG_MAPPING)), *OTHERS])
def test_a_language_model_computes_the_same_in_every_form(name, tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", uncompiled)
    model = language(tokenizer_folder, name, OTHERS.get(name, {}))
    with torch.no_grad():
        packed_equal_single(model)
        if model.config._attn_implementation == ROWS:
            for kind in ("blocks", "flex"):
                with monkeypatch.context() as forced:
                    forced.setattr("mmlab.model.language.choose", partial(forced_to, kind))
                    packed_equal_single(model)
            assert [way.split()[5] for way in model.ways] == ["dense", "plain", "blocks", "flex"]
        cached_equal_teacher_forcing(model)
        model.save(tmp_path)
        loaded = language(tokenizer_folder, name, OTHERS.get(name, {}))
        torch.nn.init.zeros_(next(loaded.parameters()))
        loaded.load(tmp_path)
        assert torch.equal(alone(model, FIRST), alone(loaded, FIRST))
    gradients_reach_every_token(model)
    if model.config.model_type in LINEAR:
        chunks_equal_logits(model)
    assert takes_masks(model.config) == (name in MASKED or name.endswith(("windows", "window")))
    if name in EAGER:
        assert model.config._attn_implementation == "eager"
    elif takes_masks(model.config):
        assert (model.config._attn_implementation == "sdpa") == (name in TENSORS)


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_by_name(name, tokenizer_folder):
    fields, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        LanguageModel(
            LanguageModelConfig(
                init="random", architecture={"model_type": name, **fields}, tokenizer=str(tokenizer_folder)
            )
        )


def test_an_attention_that_a_model_lacks_is_refused(tokenizer_folder):
    architecture = small("gptj", {})
    config = LanguageModelConfig(
        init="random", architecture=architecture, tokenizer=str(tokenizer_folder), attention="flex_attention"
    )
    with pytest.raises(ConfigError, match="cannot be built with attention=flex_attention: "):
        LanguageModel(config)
