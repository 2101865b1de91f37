"""Which of transformers' causal language models can be fed embeddings, and how they are run."""

import inspect
from typing import Any

from transformers import AutoModelForCausalLM, PretrainedConfig

from mmlab.config.errors import ConfigError, nearest
from mmlab.model.packed_rows import MASKED

# With embeddings in place of ids, the cache gives later tokens other positions than a whole text does.
_WRONG = "camembert data2vec-text moshi roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod"


def causal_class(config: PretrainedConfig) -> Any:
    """Return the class of a causal language model.

    Raises:
        ConfigError: another kind of model, or one that cannot be fed embeddings.
    """
    kind, models = config.model_type, AutoModelForCausalLM._model_mapping
    if type(config) not in models:
        kinds = sorted(known.model_type for known in list(models))
        raise ConfigError(
            f"model.language: '{kind}' is not a causal language model of transformers.{nearest(kind, kinds)}"
        )
    cls: Any = models[type(config)]
    if reason := _unfit(config, cls):
        raise ConfigError(f"model.language: '{kind}' cannot be used, because it {reason}; choose one such as llama.")
    return cls


def _unfit(config: PretrainedConfig, cls: Any) -> str | None:
    """Why a class of `AutoModelForCausalLM` cannot continue embeddings, or None."""
    if getattr(config, "is_encoder_decoder", False):
        return "has an encoder"
    if config.model_type not in MASKED and not getattr(config, "is_decoder", True):
        return "attends to later tokens (is_decoder is false in its config)"
    if config.get_text_config() is not config:
        return "has more parts than a language model (its language model is in text_config)"
    if getattr(config, "hidden_size_per_layer_input", 0):
        return "looks up token ids in every layer (hidden_size_per_layer_input), and images have none"
    takers = (cls.forward, cls.prepare_inputs_for_generation)
    if any("inputs_embeds" not in inspect.signature(taker).parameters for taker in takers):
        return "cannot continue embeddings (inputs_embeds) in transformers"
    if config.model_type in _WRONG.split():
        return "answers otherwise with transformers' cache than without it"
    return None


def pads_left(config: PretrainedConfig) -> bool:
    """Whether rows of different length can be continued together, padded on the left."""
    return config.model_type in MASKED
