"""A checkpoint of LLaVA as the folder of a run, as training would have left it."""

import json
import os
import uuid
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from mmlab.config.build import build
from mmlab.config.errors import ConfigError
from mmlab.data.config import Prompt
from mmlab.model.config import LanguageModelConfig, MLPConnectorConfig
from mmlab.model.connector import LinearConnector, MLPConnector, Newline
from mmlab.model.foreign_weights import Merged, write_model
from mmlab.model.language import LanguageModel
from mmlab.model.llava_checkpoint import LlavaCheckpoint, aligned, read_weights
from mmlab.model.llava_layouts import downloaded, read_llava
from mmlab.model.pretrained import NO_CODE, refuse_code
from mmlab.runs.disk import replacing
from mmlab.runs.run import Start, finish
from mmlab.training.artifacts import describe, merged_hash, save_parts, write_card
from mmlab.training.config import LoRAConfig
from mmlab.training.lora import CONFIG as ADAPTER_CONFIG
from mmlab.training.lora import WEIGHTS as ADAPTER_WEIGHTS
from mmlab.training.run_identity import keep_tokenizers, tokenizer_hashes
from mmlab.verbs._llava_prompt import copy_tokenizer, cut_tokens, prompt_of, spare_tokens, write_generation
from mmlab.verbs._llava_settings import Choices, is_folder, settings_of
from mmlab.weights import CARD, fill, hash_of


def convert_llava(path: Path, out: Path, choices: Choices) -> DictConfig:
    """Write the run of a checkpoint; return its config.

    Raises:
        ConfigError: a checkpoint that cannot be converted, or choices that do not fit it.
    """
    if choices.template is not None:
        Prompt(template=choices.template)  # refused before anything is read
    checkpoint = read_llava(path if path.exists() else downloaded(str(path)))
    cfg = settings_of(checkpoint, choices, out.absolute())
    with replacing(out) as draft:
        _Writer(checkpoint, cfg, choices, draft, out.absolute()).write()
    return cfg


class _Writer:
    """Writes the parts of one run, then what describes it.

    Args:
        checkpoint: what to write.
        cfg: the run's config, which is completed.
        choices: of the command line.
        draft: the folder that is written.
        out: where it will be.
    """

    def __init__(self, checkpoint: LlavaCheckpoint, cfg: DictConfig, choices: Choices, draft: Path, out: Path):
        self.checkpoint, self.cfg, self.choices, self.draft, self.out = checkpoint, cfg, choices, draft, out
        self.artifacts = draft / "artifacts"
        self.about = {"run": out.name, "converted_from": str(checkpoint.path.absolute())}
        self.model = nn.Module()  # holds the parts that have a tokenizer

    def write(self) -> None:
        self.artifacts.mkdir(parents=True)
        against = {"vision": facts} if (facts := self.write_vision()) else {}
        self.write_connector(against)
        if self.checkpoint.kind == "whole":
            checkpoint, config = self.checkpoint, self.checkpoint.language
            assert config is not None
            self.write_language(config, checkpoint.weights["language"], checkpoint.path, against)
        elif self.checkpoint.adapter is not None and is_folder(self.choices.base):
            self.write_language(*self._merged(), against)
        elif self.checkpoint.adapter is not None:
            self.write_adapter(against)
        self.write_run()

    def write_vision(self) -> dict[str, Any]:
        """Write the tower, if the checkpoint has it; return what the other parts were trained beside."""
        node, folder, tensors = self.cfg.model.vision, self.artifacts / "vision", self.checkpoint.weights.get("vision")
        local = is_folder(node.source)
        if not tensors and local:
            encoder = build(node)
            encoder.load_pretrained()
            return describe(encoder)
        if not tensors:
            with torch.device("meta"):  # the weights are not here
                return build(node).describe() if node.architecture else {}
        config = self.checkpoint.vision or self._tower_config(node, local)
        config.save_pretrained(folder)
        with torch.device("meta"):
            tower = AutoModel.from_config(config)
        write_model(folder, tower, aligned(tensors, tower), self.checkpoint.path)
        node.init, node.source, node.architecture = "pretrained", str(folder), {}
        encoder = self._encoder(node)
        encoder.load(folder)
        facts = describe(encoder)
        self._write_card(folder, encoder, facts, encoder.state_dict())
        node.source, node.architecture = str(self.out / "artifacts" / "vision"), _fields(config)
        return facts

    def _encoder(self, node: DictConfig) -> Any:
        """The tower, with the tokens that the checkpoint takes from it."""
        encoder = build(node)
        if self.checkpoint.image_token is None:
            return encoder
        # The port leaves out one token, which should be the only one before the patches, or none.
        out = 0 if self.checkpoint.features == "all" else 1
        if encoder.prefix == out:
            return encoder
        if (encoder.prefix, out) != (1, 0):
            raise ConfigError(
                f"{self.checkpoint.path} leaves out {out} of the tokens of a tower that has {encoder.prefix} before "
                "its patches; mmlab keeps the patches, and at most one of the others."
            )
        node.features = "cls_patch"
        return build(node)

    def _tower_config(self, node: DictConfig, local: bool) -> PretrainedConfig:
        """The config of a tower whose weights LLaVA's own layout has."""
        if local:
            refuse_code(node.source)
            whole = AutoConfig.from_pretrained(node.source, **NO_CODE)
            return getattr(whole, "vision_config", whole)
        if not node.architecture:
            raise ConfigError(
                f"{self.checkpoint.path} has weights of the vision tower {node.source}, but not its config; give a "
                "folder with its config.json as --vision."
            )
        fields: Any = OmegaConf.to_container(node.architecture)
        return AutoConfig.for_model(fields.pop("model_type"), **fields)

    def write_connector(self, against: Mapping[str, Any]) -> None:
        weights = dict(self.checkpoint.weights["connector"])
        layers = sorted(name for name in weights if name.endswith(".weight"))
        if not layers:
            raise ConfigError(f"{self.checkpoint.path} has a projector without weights, only {', '.join(weights)}.")
        for name in layers:  # a layer without a bias adds zero
            weights.setdefault(f"{name.removesuffix('weight')}bias", weights[name].new_zeros(len(weights[name])))
        first, last = weights[layers[0]], weights[layers[-1]]
        widths = (first.shape[1], len(last))
        if "proj.weight" in weights:
            connector: nn.Module = LinearConnector(*widths)
        else:
            self.cfg.model.connector.depth = len(layers)
            connector = MLPConnector(MLPConnectorConfig(depth=len(layers)), *widths)
        fill(connector.to(first.dtype), weights, self.checkpoint.path)
        holder = nn.Module()
        holder.connector = connector
        if newline := self.checkpoint.weights.get("newline"):
            holder.newline = Newline(len(newline["feature"]))
            fill(holder.newline.to(first.dtype), newline, self.checkpoint.path)
        language = self.checkpoint.language
        if self.checkpoint.kind == "connector" and language is not None:
            against = {**against, "language": {"vocabulary": language.vocab_size}}
        parts = [name for name, _ in holder.named_children()]
        save_parts(holder, parts, self.artifacts, self.about, dict(against))

    def write_language(
        self, config: PretrainedConfig, tensors: Mapping[str, Tensor], source: Path, against: Mapping[str, Any]
    ) -> None:
        """Write the language model with the tokenizer of `source`, and complete the prompt, which depends on it."""
        folder = self.artifacts / "language"
        folder.mkdir()
        config.save_pretrained(folder)
        tokenizer = copy_tokenizer(source, folder)
        prompt, own = prompt_of(self.checkpoint, tokenizer, self.choices.template)
        self._set_prompt(prompt)
        if not own and self.checkpoint.image_token is not None:
            tokenizer.chat_template = None  # it is the whole model's
        spare = spare_tokens(tokenizer, self.checkpoint.image_token, config.vocab_size)
        tokenizer.save_pretrained(folder)
        vocabulary: int = config.vocab_size
        if spare:
            config.vocab_size = vocabulary = tokenizer.get_vocab()[spare[0]]
            for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
                if isinstance(number := getattr(config, key, None), int) and number >= vocabulary:
                    setattr(config, key, None)
            cut_tokens(folder, spare)
        config.save_pretrained(folder)
        write_generation(source, folder, vocabulary)
        language = LanguageModel(LanguageModelConfig(source=str(folder)))
        weights = _first_rows(tensors, language.causal) if spare else tensors
        state = write_model(folder, language.causal, weights, self.checkpoint.path)
        content = hash_of({f"causal.{name}": value for name, value in state.items()})
        facts = {"content_hash": content, **language.describe()}
        self._write_card(folder, language, facts, state, against)
        node = self.cfg.model.language
        node.source, node.architecture = str(self.out / "artifacts" / "language"), _fields(config)
        self.model.language = language

    def _merged(self) -> tuple[PretrainedConfig, Mapping[str, Tensor], Path]:
        """Config, weights with the adapter added, and folder of the base that the user gave."""
        assert self.checkpoint.adapter is not None
        base = Path(self.choices.base or "").expanduser()
        refuse_code(base)
        try:
            config = AutoConfig.from_pretrained(base, **NO_CODE)
        except (OSError, ValueError) as error:
            raise ConfigError(f"The base {base} cannot be loaded: {str(error).splitlines()[0]}") from error
        adapter, settings = self.checkpoint.adapter
        beside = self.checkpoint.weights["language"]  # weights that were trained whole
        return config, Merged({**read_weights(base), **beside}, adapter, settings, self.checkpoint.path), base

    def write_adapter(self, against: Mapping[str, Any]) -> None:
        """Write the adapter as one of ours, to be merged whenever the run is loaded."""
        from peft import LoraConfig  # prints what it lacks

        assert self.checkpoint.adapter is not None
        folder, node = self.artifacts / "language", self.cfg.model.language
        if whole := list(self.checkpoint.weights["language"]):
            raise ConfigError(
                f"{self.checkpoint.path} has {whole[0]} beside its adapter, so only a whole model can be written; give "
                "the folder of its base as --base."
            )
        if node.source is None:
            raise ConfigError(
                f"{self.checkpoint.path} is an adapter of {self.checkpoint.base}, which is not here; give its base, a "
                "folder or a hub name, as --base."
            )
        adapter, settings = self.checkpoint.adapter
        own = {key: value for key, value in settings.items() if key in LoraConfig.__dataclass_fields__}
        LoraConfig(**{**own, "base_model_name_or_path": node.source, "inference_mode": True}).save_pretrained(
            str(folder)
        )
        weights = {name.replace(".default.", "."): tensor.contiguous() for name, tensor in adapter.items()}
        save_file(weights, folder / ADAPTER_WEIGHTS, {"format": "pt"})
        assert (folder / ADAPTER_CONFIG).is_file()
        base = {"content_hash": None, "source": node.source}  # its weights are not read
        facts = {"content_hash": merged_hash(None, weights), "base": base}
        self._write_card(folder, None, facts, weights, against)
        rank, alpha = settings["r"], settings["lora_alpha"]
        lora = LoRAConfig(rank, alpha, settings.get("lora_dropout", 0.0), settings.get("target_modules"))
        self.cfg.stage.lora = {"language": OmegaConf.structured(lora)}
        self._set_prompt(prompt_of(self.checkpoint, None, self.choices.template)[0])

    def _set_prompt(self, keys: Mapping[str, Any]) -> None:
        for key, value in keys.items():
            self.cfg.stage.prompt[key] = value

    def _write_card(
        self,
        folder: Path,
        part: nn.Module | None,
        facts: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        against: Mapping[str, Any] | None = None,
    ) -> None:
        shapes = {name: list(value.shape) for name, value in weights.items()}
        kind = type(part).__name__ if part is not None else LanguageModel.__name__
        about = {"part": folder.name, "class": kind, **self.about, **facts}
        write_card(folder, {**about, "against": dict(against or {}), "shapes": shapes})

    def write_run(self) -> None:
        """Write what makes the folder a complete run."""
        config: Any = OmegaConf.to_container(self.cfg, resolve=True)
        run = uuid.uuid4().hex
        identity = {"run": run, "name": self.out.name, "cwd": os.getcwd(), "tokenizers": tokenizer_hashes(self.model)}
        start = Start(self.draft, False, run, False, {}, {}, config, [])
        start.record({**identity, "converted_from": self.about["converted_from"]})
        keep_tokenizers(self.model, self.draft)
        finish(self.draft, {"steps": 0})


def _first_rows(tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Tensors of a language model with as many tokens as it has, of those that are stored."""
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    rows = {name for name, module in model.named_modules() if any(module is layer for layer in layers)}
    count = model.config.vocab_size
    return {n: tensor[:count] if n.rpartition(".")[0] in rows else tensor for n, tensor in tensors.items()}


def _fields(config: PretrainedConfig) -> dict[str, Any]:
    """A config as the `architecture` of a part's settings, without stray fields such as `vocab_size` of a tower."""
    known = {*type(config)().to_dict(), *config.attribute_map} - {"transformers_version", "architectures", "dtype"}
    return {"model_type": config.model_type} | {k: v for k, v in config.to_diff_dict().items() if k in known}


def summary(out: Path, cfg: DictConfig) -> str:
    """What a converted run holds, and the commands that use it, in lines."""
    cards = {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob(f"artifacts/*/{CARD}"))}
    counts = {name: sum(prod(shape) for shape in card["shapes"].values()) for name, card in cards.items()}
    lines = [f"{out}: {', '.join(f'{name} {count:,}' for name, count in counts.items())} parameters"]
    outside = [name for name in ("vision", "language") if name not in cards or "base" in cards[name]]
    lines += [f"{name}: {cfg.model[name].source or 'not known, give it as --base'}" for name in outside]
    system = {None: "", "": ", no system message"}.get(cfg.stage.prompt.system, ", its own system message")
    lines.append(f"prompt: {cfg.stage.prompt.template}{system}; images: {cfg.data.aspect}")
    if cfg.model.language.source is not None:
        lines.append(f'mmlab chat run={out} image=photo.jpg question="What is this?"')
    sources = [f"model.{name}.source={cfg.model[name].source}" for name in ("language", "vision") if name in cards]
    lines.append(" ".join([f"mmlab train experiment=… stage.init_from=[{out}]", *sources]))
    return "\n".join(lines)
