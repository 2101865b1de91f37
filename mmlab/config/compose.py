"""From a command line to a config: Hydra, run by the verbs, with our checks and errors."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import configure_log, run_job
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, open_dict

from mmlab.config.disk_errors import disk_error
from mmlab.config.errors import ConfigError, UserError
from mmlab.config.flags import parse, parser
from mmlab.config.folders import conf_dir, local_conf_dir
from mmlab.config.help import help_text
from mmlab.config.loader import CheckedLoader
from mmlab.config.multirun import Multirun, run_in_turn
from mmlab.config.schemas import register

Task = Callable[[DictConfig], Any]
Sweep = Callable[[Multirun, Task], None]


def hydra_verb(config_name: str, task: Task, argv: list[str], sweep: Sweep = run_in_turn) -> int:
    """Run `task` with the config composed from `argv`; all of Hydra's flags (-m, --cfg, --info, -cd, -sc …) work.

    Args:
        config_name: root config in `conf/`, for example `train`.
        task: called with the composed config, once per point of a sweep; its docstring begins `--help`.
        argv: the arguments after the verb, flags and overrides in any order.
        sweep: runs the points of `-m`.

    Returns:
        The exit code 0.

    Raises:
        ConfigError: an invalid command line or config.
        UserError: raised by the task.
    """
    args = parse(argv)
    config_name = args.config_name or config_name
    lenient = args.help is not None or args.cfg is not None or args.info is not None or args.shell_completion
    hydra = start(config_name, args.config_path, args.config_dir, lenient)
    try:
        if args.help is not None:
            cfg = hydra.config_loader.load_configuration(config_name, args.overrides, RunMode.RUN)
            command = config_name.replace("_", " ", 1)
            print(help_text(args.help, command, task.__doc__, cfg, hydra.config_loader))
        elif args.hydra_help:
            hydra.hydra_help(config_name=config_name, args_parser=parser(), args=args)
        elif args.cfg:
            hydra.show_cfg(config_name, args.overrides, args.cfg, args.package, args.resolve)
        elif args.info:
            hydra.show_info(args.info, config_name=config_name, overrides=args.overrides)
        elif args.shell_completion:
            hydra.shell_completion(config_name=config_name, overrides=args.overrides)
        else:
            _run(hydra, config_name, task, args, sweep)
    finally:
        GlobalHydra.instance().clear()
    return 0


def compose(config_name: str, overrides: list[str] | None = None, config_dir: Path | str | None = None) -> DictConfig:
    """Compose a config as a verb does, for tests and notebooks.

    Args:
        config_name: root config, for example `train`.
        overrides: as on the command line.
        config_dir: the folder of the root config, instead of the shipped `conf/`.

    Raises:
        ConfigError: an invalid override or config, or a missing value.
    """
    hydra = start(config_name, config_dir)
    try:
        cfg = hydra.config_loader.load_configuration(config_name, list(overrides or []), RunMode.RUN, from_shell=False)
    finally:
        GlobalHydra.instance().clear()
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def start(
    name: str, config_path: Path | str | None = None, config_dir: str | None = None, lenient: bool = False
) -> Hydra:
    """Return a Hydra with the shipped configs (or those in `config_path`), `./conf` and `config_dir`."""
    version.setbase("1.3")
    register()
    loader = CheckedLoader(_search_path(config_path, config_dir), lenient)
    # Hydra would take the plugin's option of the same name as the schema of ours, which it no longer supports.
    ConfigStore.instance().repo.get("hydra", {}).get("sweeper", {}).pop("optuna.yaml", None)
    hydra = Hydra(task_name=name, config_loader=loader)
    GlobalHydra.instance().clear()
    GlobalHydra.instance().initialize(hydra)
    return hydra


def _search_path(config_path: Path | str | None, config_dir: str | None) -> ConfigSearchPath:
    main = Path(config_path or conf_dir()).resolve()
    for folder in (main, Path(config_dir or main)):
        if not folder.is_dir():
            raise ConfigError(f"There is no config folder {folder}.")
    path = create_config_search_path(str(main))
    local = local_conf_dir() if config_path is None else None
    for provider, folder in (("command-line", config_dir), ("working folder", local)):
        if folder is not None:
            where = f"file://{Path(folder).resolve()}"
            path.prepend(provider=provider, path=where, anchor=SearchPathQuery(provider="schema"))
    return path


def _run(hydra: Hydra, config_name: str, task: Task, args: Namespace, sweep: Sweep) -> None:
    cfg = None if args.multirun else _compose_run(hydra, config_name, args.overrides)
    if cfg is None:
        cfg = hydra.compose_config(config_name, [*args.overrides, "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
        configure_log(cfg.hydra.job_logging, cfg.hydra.verbose)
        sweep(Multirun(hydra.config_loader, cfg, _flags(args)), task)
        return
    failures: list[UserError] = []

    def job(cfg: DictConfig) -> None:
        # Hydra would print the exception with a line of its own.
        try:
            task(cfg)
        except UserError as error:
            failures.append(error)
        except Exception as error:
            if (fault := disk_error(error)) is None:
                raise
            failures.append(fault)

    # As `Hydra.run` does, which would compose the config a second time.
    callbacks = Callbacks(cfg)
    context = HydraContext(config_loader=hydra.config_loader, callbacks=callbacks)
    callbacks.on_run_start(config=cfg, config_name=config_name)
    done = run_job(job, cfg, job_dir_key="hydra.run.dir", job_subdir_key=None, hydra_context=context)
    callbacks.on_run_end(config=cfg, config_name=config_name, job_return=done)
    _ = done.return_value  # raises the job's exception
    if failures:
        raise failures[0]


def _compose_run(hydra: Hydra, config_name: str, overrides: list[str]) -> DictConfig | None:
    """The config of a run; None if the config itself asks for a sweep, with `hydra.mode: MULTIRUN`."""
    try:
        cfg = hydra.compose_config(config_name, list(overrides), RunMode.RUN, with_log_configuration=True)
    except Exception:
        # What is wrong in a run may be right in a sweep.
        if hydra.get_mode(config_name, overrides) == RunMode.MULTIRUN:
            return None
        raise
    if cfg.hydra.mode is None:
        cfg.hydra.mode = RunMode.RUN
    return cfg if cfg.hydra.mode == RunMode.RUN else None


def _flags(args: Namespace) -> list[str]:
    """The flags that select the config files."""
    named = {"--config-path": args.config_path, "--config-dir": args.config_dir, "--config-name": args.config_name}
    return [word for flag, value in named.items() if value for word in (flag, str(value))]
