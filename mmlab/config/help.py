"""The texts of `--help`: a screen about the verb, `--help groups` for the options, `--help keys` for the keys."""

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import Field
from functools import cache
from typing import Any

import yaml
from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf

from mmlab.config.explain import groups_of
from mmlab.config.fields import BOUNDS, schema_fields

FLAGS = """More
  --help groups    config groups and their options
  --help keys      keys of the composed config, explained; with overrides, such as experiment=…, those of that config
  --cfg job        the composed config instead of a run
  -m               sweep over key=a,b or group=a,b
  --config-dir     a folder of your own options (./conf is used without it)
  --hydra-help     all flags"""


def help_text(topic: str, command: str, doc: str | None, cfg: DictConfig, loader: ConfigLoader) -> str:
    """Return what `--help` prints.

    Args:
        topic: `verb`, `groups` or `keys`.
        command: the verb as it is typed.
        doc: docstring of the verb's task: what it does, and examples.
        cfg: the composed config.
        loader: the loader that composed it.
    """
    if topic == "keys":
        return "\n".join(_keys(cfg, ""))
    chosen = cfg.hydra.runtime.choices
    if topic == "groups":
        return "\n".join(_groups(loader, chosen)) or f"mmlab {command} has no config groups."
    usage = f"mmlab {command} [flags] [group=option] [key=value]"
    groups = ", ".join(sorted({re.split("[/@]", group)[0] for group in chosen} - {"hydra"} & set(groups_of(loader))))
    tops = f"Groups: {groups}\nKeys:   {', '.join(str(key) for key in cfg if key != 'hydra')}"
    return "\n\n".join([usage, (doc or "").strip(), tops if groups else tops.splitlines()[1], FLAGS])


def _groups(loader: ConfigLoader, chosen: Iterable[str]) -> Iterator[str]:
    """A paragraph for each config group that the command has; subfolders are options of their group."""
    tops, shown = {re.split("[/@]", group)[0] for group in chosen}, set()
    for group in sorted(groups_of(loader)):
        options = [option for option in loader.get_group_options(group) if f"{group}/{option}" not in shown]
        if group.split("/")[0] not in tops or not options:
            continue
        shown |= {f"{group}/{option}" for option in options}
        for folder in sorted({option.rpartition("/")[0] for option in options}):
            names = [option.rpartition("/")[2] for option in options if option.rpartition("/")[0] == folder]
            yield f"{group}={folder + '/' if folder else ''}  {', '.join(names)}"


def _keys(node: DictConfig, indent: str) -> Iterator[str]:
    """The config as YAML, each key with the comment of its field."""
    rules, kind = schema_fields(node), OmegaConf.get_type(node)
    explained = field_comments(kind) if rules and kind is not None else {}
    for key in node:
        if key == "hydra" and not indent:
            continue
        value = node._get_node(key)
        words = [_limits(rules[str(key)]) if str(key) in rules else "", explained.get(str(key), "")]
        note = "; ".join(word for word in words if word)
        comment = f"  # {note}" if note else ""
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_missing() and value:
            yield f"{indent}{key}:{comment}"
            yield from _keys(value, f"{indent}  ")
        else:
            yield f"{indent}{key}: {_flow(value)}{comment}"


def _flow(node: Any) -> str:
    value = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node._value()
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _limits(rules: Field) -> str:
    """Choices or bounds of a field, or the config group that it takes."""
    facts = rules.metadata
    if choices := facts.get("choices"):
        return " | ".join(choices)
    bounds = [f"{name.replace('_', ' ')} {facts[name]}" for name in BOUNDS if facts.get(name) is not None]
    return ", ".join(bounds)


@cache
def field_comments(kind: type) -> dict[str, str]:
    """Return the comment beside or above each field of a dataclass and of its bases, read from the source."""
    comments: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        source = inspect.getsource(base)
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        lines = {t.start[0]: (t.start[1], t.string) for t in tokens if t.type == tokenize.COMMENT}
        for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            above, last = node.lineno - 1, node.end_lineno or node.lineno
            words: list[str] = []
            while above in lines and lines[above][0] == node.col_offset:
                words.insert(0, lines[above][1])
                above -= 1
            words += [lines[last][1]] if last in lines else []
            if words:
                text = " ".join(word.lstrip("# ") for word in words)
                comments[node.target.id] = re.sub(r"type: ignore\S*( # )?", "", text)
    return comments
