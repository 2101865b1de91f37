"""Hydra's config loader with our checks: every composition (run, sweep, --cfg) passes through it."""

import os
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from mmlab.config.build import allowed_prefixes
from mmlab.config.errors import ConfigError
from mmlab.config.explain import COMPOSITION_ERRORS, explain, no_choice
from mmlab.config.fields import check_fields, missing_values, schema_fields
from mmlab.config.hydra_keys import check_hydra, check_search_path
from mmlab.config.schemas import attach


class CheckedLoader(ConfigLoaderImpl):
    """Composes a config, names the run and checks the result against the dataclasses.

    Args:
        search_path: the folders with config files.
        lenient: leave missing groups and values as `???`, for showing a config.
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
            ConfigError: an invalid config; with HYDRA_FULL_ERROR=1 the original exception.
        """
        if self.lenient:
            run_mode, validate_sweep_overrides = RunMode.MULTIRUN, False
        try:
            cfg = super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
            check_hydra(cfg, overrides, allowed_prefixes())
            if config_name is not None:
                attach(cfg)
        except COMPOSITION_ERRORS as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            raise explain(error, self, config_name, overrides) from error
        if config_name is not None:
            _apply_command_line(cfg)
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
        """As Hydra's, but without the schemas, and with options in subfolders (`llava/align`) if a group has no others.

        Completion, help and `glob(*)` use this list.
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
            # Hydra's own method would copy all schemas, for a search path that cannot have changed.
            return self.repository.get_group_options(group, kind)
        return super().get_group_options(group, kind, config_name, overrides)

    def _process_config_searchpath(self, config_name: str | None, parsed_overrides: Any, repo: Any) -> None:
        # Hydra opens these folders, and imports packages, before there is a config to check.
        page = repo.load_config(config_path=config_name) if config_name is not None else None
        if page is not None and OmegaConf.is_dict(page.config):
            check_search_path(OmegaConf.select(page.config, "hydra.searchpath"))
        for override in parsed_overrides:
            if override.get_key_element() == "hydra.searchpath":
                check_search_path(override.value())
        super()._process_config_searchpath(config_name, parsed_overrides, repo)

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


def _apply_command_line(cfg: DictConfig) -> None:
    """Let the dataclasses of the root and of its sections set values that depend on the command line.

    A dataclass does so in a static method `apply_command_line(node, choices, overrides)`.
    """
    choices: Any = OmegaConf.to_container(cfg.hydra.runtime.choices, resolve=False)
    overrides: Any = OmegaConf.to_container(cfg.hydra.overrides.task, resolve=False)
    sections = [cfg._get_node(key) for key in cfg if key != "hydra"]
    with open_dict(cfg):
        for node in [cfg, *sections]:
            apply = getattr(OmegaConf.get_type(node), "apply_command_line", None)
            if isinstance(node, DictConfig) and apply is not None:
                apply(node, choices, overrides)
