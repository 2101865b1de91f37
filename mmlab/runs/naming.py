"""Names of runs and sweeps, derived from the command line: the same command is the same run."""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from mmlab.config.multirun import canonical, is_sweep
from mmlab.runs.disk import to_json
from mmlab.runs.finished_runs import only_run_of, recipe_of

# Keys that affect how or where a run is executed or when it is stopped, but not its result.
EXECUTION = (
    "run",
    "hydra",
    "sweep",
    "sampler",
    "logger",
    "callbacks.checkpoint",
    "callbacks.samples",
    "callbacks.data_report",
    "callbacks.picture_use",
    "callbacks.progress.peak_tflops",
    "model.language.attention",
    "model.language.loss",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.fsdp",
    "trainer.profile",
    "trainer.gradient_checkpointing",
    "trainer.compile",
    "data.workers",
    "data.cache",
    "data.micro_batch",
    "data.bad_budget",
)


def is_execution(key: str, stage: type | None = None) -> bool:
    """Whether a key or config group affects only how a run is executed, not its result.

    Args:
        key: for example `data.workers`.
        stage: the dataclass of the run's stage; the micro batch matters where a stage compares samples of a batch.
    """
    if key == "data.micro_batch" and getattr(stage, "compares_samples", False):
        return False
    key = key.replace("/", ".")
    return any(key == name or key.startswith(f"{name}.") for name in EXECUTION)


def stage_of(cfg: DictConfig) -> type | None:
    """Return the dataclass of the stage in `cfg`, None if there is none."""
    return OmegaConf.get_type(OmegaConf.select(cfg, "stage", throw_on_missing=False))


def run_name(choices: Mapping[str, str | None], overrides: Sequence[str], stage: type | None = None) -> str | None:
    """Name a run after its recipe (or its model and stage), swapped options, and a hash of its other overrides.

    Args:
        choices: config group → option (Hydra's `runtime.choices`).
        overrides: `key=value` from the command line; the last one of a key wins.
        stage: the dataclass of the stage.

    Returns:
        The name, such as `llava-align_tiny-clip_tiny-1f2e3d4c`; None if neither a recipe nor a model and a stage are
        chosen.
    """
    parts = _chosen(choices)
    if any(part in (None, "???") for part in parts):
        return None
    swapped, changed = _changes(choices, overrides, stage)
    words = [*parts, *swapped, *([_digest(changed)] if changed else [])]
    return "-".join(map(str, words)).replace("/", "-")


def sweep_name(choices: Mapping[str, str | None], overrides: Sequence[str], stage: type | None = None) -> str:
    """Name a sweep after its recipe (or its model and stage) and a hash of its overrides.

    Args:
        choices: config group → option, for the groups that are not swept.
        overrides: `key=value` from the command line, including sweeps such as `optim.lr=1e-3,1e-4`.
        stage: the dataclass of the stage, if all points have the same.
    """
    hashed = {}
    for override in overrides:
        key = override.partition("=")[0].lstrip("+")
        # An execution key counts if it is swept; the metric counts because it directs a search.
        if is_sweep(override) or override.startswith("sweep.") or not is_execution(key, stage):
            hashed[key] = canonical(override)
    parts = [str(part) for part in _chosen(choices) if part not in (None, "???")]
    return "-".join([*parts, "sweep", _digest(hashed)]).replace("/", "-")


def predecessor(name: str, swapped: Sequence[str], root: Path) -> str:
    """Return the run that a recipe's name in `stage.init_from` refers to: that recipe with the same swapped options.

    The earlier recipe may lack some of the groups, so the existing run with the most of `swapped` is taken. Without
    one, it is the run of that name, or else the only complete run of the recipe.
    """
    bare = name.replace("/", "-")
    for count in range(len(swapped), 0, -1):
        for some in combinations(swapped, count):
            if (root / "-".join([bare, *some]) / "config.yaml").is_file():
                return "-".join([bare, *some])
    if any((folder / "config.yaml").is_file() for folder in (Path(name), root / name, root / bare)):
        return name
    only = only_run_of(name, root)
    return name if only is None else only.name


def _chosen(choices: Mapping[str, str | None]) -> list[str | None]:
    """The recipe, or else the model and the stage."""
    recipe = choices.get("experiment")
    return [recipe] if recipe else [choices.get("model"), choices.get("stage")]


def _digest(values: dict[str, str]) -> str:
    return hashlib.sha256(to_json(sorted(values.items())).encode()).hexdigest()[:8]


def _changes(
    choices: Mapping[str, str | None], overrides: Sequence[str], stage: type | None
) -> tuple[list[str], dict[str, str]]:
    """(swapped options of config groups, other overridden keys and their values), without execution keys."""
    named = {"experiment"} if choices.get("experiment") else {"model", "stage"}
    swapped: dict[str, str] = {}
    changed: dict[str, str] = {}
    for override in overrides:
        key, _, value = canonical(override).partition("=")
        bare = key.lstrip("+")
        if bare in named | {"trainer"} or is_execution(bare, stage):
            continue
        (swapped if bare in choices and value.replace("_", "").isalnum() else changed)[bare] = value
    return [swapped[group] for group in sorted(swapped)], changed


def name_run(cfg: DictConfig, choices: Mapping[str, str | None], overrides: Sequence[str]) -> None:
    """Set, in place, the values that depend on the command line: `run.name` and the runs in `stage.init_from`.

    Values given on the command line stay.

    Args:
        cfg: composed `TrainConfig`.
        choices: config group → option (Hydra's `runtime.choices`).
        overrides: `key=value` from the command line.
    """
    if cfg.run.name is None:
        cfg.run.name = run_name(choices, overrides, stage_of(cfg))
    runs = OmegaConf.select(cfg, "stage.init_from", throw_on_missing=False)
    if not runs:
        return
    overridden = any(override.lstrip("+").startswith("stage.init_from") for override in overrides)
    swapped = [] if overridden else _changes(choices, overrides, stage_of(cfg))[0]
    root, before = Path(cfg.run.root), [] if cfg.run.fresh else _earlier_choice(Path(cfg.run.dir))
    for i, run in enumerate(runs):
        if i < len(before) and recipe_of(root / before[i].replace("/", "-")) == run:
            runs[i] = before[i]  # a resumed run keeps those that it started from, even if there are more by now
        else:
            runs[i] = predecessor(run, swapped, root)


def _earlier_choice(folder: Path) -> list[str]:
    """The runs that the run in a folder started from; empty if there is no run, or one that cannot be read."""
    try:
        return list(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["stage"]["init_from"])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return []
