"""A causal language model on this machine, instead of an endpoint."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmlab.config.errors import ConfigError
from mmlab.curate.client import Message, Reply
from mmlab.curate.config import LocalModelConfig
from mmlab.data.config import Prompt
from mmlab.data.conversation import chat_prompt, check_vocabulary
from mmlab.data.sample_types import SampleError
from mmlab.data.templates import template_named
from mmlab.data.turns import Turn
from mmlab.model.config import LanguageModelConfig
from mmlab.model.language import LanguageModel

ROLES = {"user": "human", "assistant": "gpt"}


class LocalModel:
    """Any `AutoModelForCausalLM` with its tokenizer; decodes greedily, one dialogue at a time.

    Args:
        config: settings.

    Raises:
        ConfigError: model, tokenizer or template cannot be loaded.
    """

    def __init__(self, config: LocalModelConfig):
        self.model = config.source
        self.language = LanguageModel(LanguageModelConfig(source=config.source))
        self.language.load_pretrained()
        self.language.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.settings: dict[str, Any] = {
            "template": config.template,
            "max_tokens": config.max_tokens,
            "weights": _weights(Path(config.source)),  # another model may be saved into the same folder
        }
        self.stop = template_named(config.template).stop(self.language.tokenizer)
        self.options: dict[str, Any] = {"max_new_tokens": config.max_tokens, "do_sample": False}
        if self.stop != self.language.tokenizer.eos_token:
            self.options |= {"stop_strings": [self.stop], "tokenizer": self.language.tokenizer}

    def complete(self, messages: Sequence[Message], stop: threading.Event | None = None) -> Reply:
        """Reply to a dialogue that ends with the user's turn and may begin with a system message.

        There is one attempt, so `stop` has no effect.

        Raises:
            ConfigError: a message of another role, or with a token that the model does not have.
        """
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        turns = messages[1:] if messages[0]["role"] == "system" else messages
        if wrong := [turn["role"] for turn in turns if turn["role"] not in ROLES]:
            raise ConfigError(f"a message's role is user or assistant, the first may be system, not '{wrong[0]}'.")
        dialogue = [Turn(ROLES[turn["role"]], turn["content"]) for turn in turns]  # type: ignore[arg-type]
        tokenizer = self.language.tokenizer
        prompt = Prompt(self.settings["template"], pictures="none", system=system)
        tokens = chat_prompt(dialogue, prompt, tokenizer).input_ids
        try:
            check_vocabulary(tokens, self.language.vocabulary, tokenizer)
        except SampleError as error:
            raise ConfigError(str(error)) from error
        ids = torch.tensor([tokens])
        ids = ids.to(next(self.language.parameters()).device)
        new = self.language.generate(self.language.embed(ids), torch.ones_like(ids), **self.options)[0]
        decoded = str(tokenizer.decode(new, skip_special_tokens=self.stop == tokenizer.eos_token))
        text = decoded.split(self.stop)[0].strip()
        cut = len(new) >= self.options["max_new_tokens"] and self.stop not in str(tokenizer.decode(new))
        finish = "length" if cut else "stop" if text else "empty"
        return Reply(text, finish, ids.shape[1], len(new), model=self.model)


def _weights(folder: Path) -> list[list[str | int]]:
    """Names, sizes and modification times of the weights in a folder; nothing for a hub name."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
