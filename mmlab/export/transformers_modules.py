"""Our vision-language models as transformers' classes. Modules and weights are taken over, not copied.

Legend: P tokens per image, V vision width, D language width.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, AddedToken, PretrainedConfig

from mmlab.config.errors import ConfigError
from mmlab.data.config import ANYRES
from mmlab.data.sample_types import ImageSpec
from mmlab.data.turns import IMAGE
from mmlab.export.processors import grid_pixels
from mmlab.model.connector import LinearConnector, MLPConnector
from mmlab.model.vlm import VisionLanguageModel

ROWS = 64
"""The number of embeddings becomes a multiple of it when one for the picture's token is added (LLaVA-1.5's port)."""


def add_image_token(tokenizer: Any, causal: Any) -> int:
    """Add the token that stands for a picture's features, and an embedding of it where the model has none; its id.

    Ids of other tokens stay. New rows of the embedding and of the output layer are the mean of the others: such a
    token's logit is the mean of all logits, so greedy decoding never chooses it.
    """
    tokenizer.add_tokens([AddedToken(IMAGE, normalized=False, special=True)], special_tokens=True)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    rows = causal.get_input_embeddings().num_embeddings
    if image_id >= rows:
        causal.resize_token_embeddings(image_id + 1, pad_to_multiple_of=ROWS, mean_resizing=False)
        for layer in {causal.get_input_embeddings(), causal.get_output_embeddings()} - {None}:
            for values in (layer.weight, getattr(layer, "bias", None)):
                if values is not None:
                    values.data[rows:] = values.data[:rows].float().mean(0)
    return image_id


def llava(model: VisionLanguageModel, image_id: int, spec: ImageSpec) -> Any:
    """Return a `LlavaForConditionalGeneration` of the model's parts, whose vision tower has all its layers.

    With `anyres` it is a `LlavaNextForConditionalGeneration`.

    Raises:
        ConfigError: a part that the class cannot hold.
    """
    import transformers as library

    tiled = spec.aspect == ANYRES
    name = "LlavaNext" if tiled else "Llava"
    vision: Any = model.vision
    causal = model.language.causal
    base, head = causal.base_model, causal.get_output_embeddings()
    tower_config = vision.tower.config
    if not hasattr(tower_config, "hidden_size"):  # of a tower with stages, such as LeViT; the projector asks for it
        tower_config.hidden_size = vision.width
    _check_parts(model, spec, name)
    act, first, second = _projector(model.connector, name)
    tied = head.weight is causal.get_input_embeddings().weight
    if tied and not hasattr(base, "embed_tokens"):  # the class finds tied weights by this name
        head, tied = copy.deepcopy(head), False
    text_config = copy.deepcopy(causal.config)
    text_config.tie_word_embeddings = tied
    config = getattr(library, f"{name}Config")(
        vision_config=tower_config,
        text_config=text_config,
        image_token_index=image_id,
        image_seq_length=model.tokens_per_image,
        projector_hidden_act=act,
        vision_feature_layer=vision.feature_layer,
        vision_feature_select_strategy="default" if vision.prefix and not vision.keep_class else "full",
        tie_word_embeddings=tied,
        **({"image_grid_pinpoints": grid_pixels(spec)} if tiled else {}),
    )
    with torch.device("meta"):
        exported: Any = getattr(library, f"{name}ForConditionalGeneration")(config)
    exported.model.vision_tower, exported.model.language_model, exported.lm_head = vision.tower, base, head
    exported.model.multi_modal_projector.linear_1 = first
    exported.model.multi_modal_projector.linear_2 = second
    if tiled:
        assert model.newline is not None
        exported.model.image_newline = model.newline.feature
    return exported.eval()


def _check_parts(model: VisionLanguageModel, spec: ImageSpec, name: str) -> None:
    """Raise ConfigError for a tower or language model that transformers' `Llava` or `LlavaNext` cannot hold."""
    vision: Any = model.vision
    causal, tower_config = model.language.causal, vision.tower.config
    kind, head = causal.config.model_type, causal.get_output_embeddings()
    if type(causal.base_model) is not _mapped(causal.config) or getattr(head, "bias", None) is not None:
        raise ConfigError(
            f"{name}ForConditionalGeneration cannot hold a {kind} with its output layer; export needs one "
            "such as llama, qwen2 or mistral."
        )
    if type(vision.tower) is not _mapped(tower_config):
        raise ConfigError(f"{name}ForConditionalGeneration cannot hold a {tower_config.model_type}.")
    if vision.prefix > 1 and not vision.keep_class:
        raise ConfigError(
            f"{name}ForConditionalGeneration drops one token before the patches, but the tower "
            f"{tower_config.model_type} has {vision.prefix}."
        )
    patch = getattr(tower_config, "patch_size", None)
    if spec.aspect == ANYRES and (not isinstance(patch, int) or (spec.size // patch) ** 2 != spec.tokens):
        raise ConfigError(
            f"LlavaNextForConditionalGeneration takes a feature for each patch of a tile, but the tower "
            f"{tower_config.model_type} gives {spec.tokens} for {spec.size} pixels and patches of {patch}."
        )


def _mapped(config: PretrainedConfig) -> Any:
    """The class with which transformers' AutoModel loads such a config."""
    return MODEL_MAPPING.get(type(config), None)


def _projector(connector: nn.Module, name: str) -> tuple[str, nn.Module, nn.Module]:
    """(activation, first layer, second layer) of the projector of transformers' `Llava` or `LlavaNext`.

    Behind a single linear layer there is an identity, which changes no number.

    Raises:
        ConfigError: another connector.
    """
    layers = [connector.proj] if isinstance(connector, LinearConnector) else []
    if isinstance(connector, MLPConnector):
        layers = [layer for layer in connector.layers if isinstance(layer, nn.Linear)]
    if len(layers) == 2:
        return "gelu", *layers  # type: ignore[return-value]
    if len(layers) != 1:
        depth = f" of depth {len(layers)}" if layers else ""
        raise ConfigError(
            f"{name}ForConditionalGeneration cannot hold a {type(connector).__name__}{depth}; it takes "
            "model/connector=linear, and model/connector=mlp2x_gelu."
        )
    width, like = layers[0].out_features, layers[0].weight
    identity = nn.Linear(width, width, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        identity.weight.copy_(torch.eye(width))
        identity.bias.zero_()  # type: ignore[union-attr]
    return "linear", layers[0], identity


def blip2(model: VisionLanguageModel, image_id: int) -> Any:
    """Return a `Blip2ForConditionalGeneration` of a model with a Q-Former; its tower ends with the layer that is read.

    Raises:
        ConfigError: a part that the class cannot hold.
    """
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    vision: Any = model.vision
    qformer, causal = model.qformer, model.language.causal
    assert qformer is not None
    kind = vision.tower.config.model_type
    if kind != "blip_2_vision_model" or not vision.keep_class:
        features = "" if vision.keep_class else " without the class token (model.vision.features=patch)"
        raise ConfigError(
            f"Blip2ForConditionalGeneration cannot hold a Q-Former that reads a {kind}{features}; it takes "
            "a blip_2_vision_model with features=cls_patch, such as model/vision=eva_vit_g."
        )
    if not isinstance(model.connector, LinearConnector):
        raise ConfigError(
            f"Blip2ForConditionalGeneration cannot hold a {type(model.connector).__name__} between Q-Former and "
            "language model; it takes model/connector=linear."
        )
    vision_config = copy.deepcopy(vision.tower.config)
    vision_config.num_hidden_layers = len(vision.tower.encoder.layers)
    config = Blip2Config(
        vision_config=vision_config,
        qformer_config=qformer.config,
        text_config=causal.config,
        num_query_tokens=qformer.tokens_per_image,
        image_token_index=image_id,
    )
    with torch.device("meta"):
        exported: Any = Blip2ForConditionalGeneration(config)
    vision.tower.config = vision_config
    vision.tower.post_layernorm.load_state_dict(qformer.norm.state_dict())
    exported.vision_model, exported.qformer, exported.query_tokens = vision.tower, qformer.qformer, qformer.query_tokens
    exported.language_projection, exported.language_model = model.connector.proj, causal
    return exported.eval()
