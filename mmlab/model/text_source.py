"""Text encoders of conditioners: found in a pipeline of diffusers, and built without what is not used."""

import inspect
from dataclasses import replace
from typing import Any

from transformers import AutoModelForTextEncoding, PretrainedConfig

from mmlab.config.errors import ConfigError, nearest
from mmlab.model.config import TextConditionConfig
from mmlab.model.diffusers_source import fetch_text, reads_config, text_place, tokenizer_folder


def in_pipeline(config: TextConditionConfig, weights: bool = False) -> TextConditionConfig:
    """Return settings that name the text encoder and the tokenizer of a pipeline as folders, where that is the source.

    Args:
        config: settings.
        weights: whether the encoder's weights are needed, too; what is needed of a pipeline on the hub is downloaded.
    """
    if config.source is None or config.init == "random" or not reads_config(config):
        return config
    place = text_place(config.source, "conditioner")
    if place is None:
        return config
    tokenizer = config.tokenizer or tokenizer_folder(place)
    folder = fetch_text(place) if weights else place.folder()
    return replace(config, source=folder, tokenizer=tokenizer, architecture={})


def without_pooler(config: PretrainedConfig) -> dict[str, bool]:
    """Return the argument that omits BERT's pooler: its output is not used, and DDP refuses unused weights.

    Raises:
        ConfigError: transformers has no text encoder of this kind.
    """
    encoders: Any = AutoModelForTextEncoding._model_mapping
    if type(config) not in encoders:
        kinds = sorted(kind.model_type for kind in list(encoders))
        hint = nearest(config.model_type, kinds)
        raise ConfigError(
            f"model.conditioner: '{config.model_type}' is not a text encoder such as clip_text_model.{hint}"
        )
    takes = inspect.signature(encoders[type(config)].__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
