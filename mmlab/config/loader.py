"""Hydra's config loader, with our checks behind it: every way to a config (run, sweep, --cfg) passes here."""

import os
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from mmlab.config.errors import ConfigError
from mmlab.config.explain import COMPOSITION_ERRORS, explain, no_choice
from mmlab.config.fields import check_fields, missing_values, schema_fields
from mmlab.config.schemas import attach


class CheckedLoader(ConfigLoaderImpl):
    """Composes, names the run and compares the result with the dataclasses.

    Args:
        search_path: where config files are looked for.
        lenient: for showing a config: groups and values that nobody has chosen stay `???`.
    """

    def __init__(self, search_path: ConfigSearchPath, lenient: bool = False):
        super().__init__(search_path)
        self.lenient = lenient

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Compose `config_name` with `overrides`.

        Raises:
            ConfigError: anything that is wrong with the config; the original exception when
                HYDRA_FULL_ERROR=1.
        """
        if self.lenient:
            run_mode, validate_sweep_overrides = RunMode.MULTIRUN, False
        try:
            cfg = super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        except COMPOSITION_ERRORS as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            raise explain(error, self, config_name, overrides) from error
        if config_name is not None:
            try:
                attach(cfg)
            except COMPOSITION_ERRORS as error:
                raise explain(error, self, config_name, overrides) from error
            _settle(cfg)
            check_fields(cfg)
            if run_mode == RunMode.RUN:
                self._require_values(cfg)
        return cfg

    def get_group_options(
        self,
        group_name: str,
        results_filter: ObjectType | None = ObjectType.CONFIG,
        config_name: str | None = None,
        overrides: list[str] | None = None,
    ) -> list[str]:
        """As Hydra's, but without the schemas, and with options in folders where a group has no direct ones.

        Completion, help and `glob(*)` then offer what can be chosen, `llava/align` too.
        """
        options = self._listed(group_name, results_filter, config_name, overrides)
        if results_filter is ObjectType.CONFIG and group_name and not options:
            for folder in self._listed(group_name, ObjectType.GROUP, config_name, overrides):
                inner = self.get_group_options(f"{group_name}/{folder}", results_filter, config_name, overrides)
                options += [f"{folder}/{option}" for option in inner]
        return sorted({option for option in options if group_name or option != "schema"})

    def _listed(
        self, group: str, kind: ObjectType | None, config_name: str | None, overrides: list[str] | None
    ) -> list[str]:
        if config_name is None and not overrides:
            # Nothing could change where files are looked for; Hydra would copy all schemas to find that out.
            return self.repository.get_group_options(group, kind)
        return super().get_group_options(group, kind, config_name, overrides)

    def _require_values(self, cfg: DictConfig) -> None:
        missing = missing_values(cfg)
        if not missing:
            return
        key = missing[0]
        parent = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg
        rules = schema_fields(parent).get(key.rpartition(".")[2])
        if rules is not None and "group" in rules.metadata:
            raise ConfigError(no_choice(rules.metadata["group"], self))
        raise ConfigError(f"'{key}' has no value; give {key}=…")


def _settle(cfg: DictConfig) -> None:
    """Let the root's dataclass, and then each section's, complete its node from the command line.

    A dataclass does so in a static method `settle(node, choices, overrides)`.
    """
    choices: Any = OmegaConf.to_container(cfg.hydra.runtime.choices, resolve=False)
    overrides: Any = OmegaConf.to_container(cfg.hydra.overrides.task, resolve=False)
    sections = [cfg._get_node(key) for key in cfg if key != "hydra"]
    with open_dict(cfg):
        for node in [cfg, *sections]:
            settle = getattr(OmegaConf.get_type(node), "settle", None) if isinstance(node, DictConfig) else None
            if settle is not None:
                settle(node, choices, overrides)
