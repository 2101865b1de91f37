"""The shipped `conf/`: every option has a schema, every file composes, every recipe checks."""

from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from mmlab.config.build import check_targets
from mmlab.config.compose import compose, conf_dir, start
from mmlab.config.errors import ConfigError
from mmlab.config.explain import root_schema
from mmlab.config.schemas import schemas
from tests.config.tiny_conf import write_conf

CONF = conf_dir()
# Groups whose options are merged into sections with a schema, or belong to Hydra.
WITHOUT = ("experiment", "debug", "hydra", "callbacks")
OPTIONS = sorted(
    path.relative_to(CONF).with_suffix("").as_posix()
    for path in CONF.rglob("*.yaml")
    if path.parent != CONF and path.relative_to(CONF).parts[0] not in WITHOUT
)
RECIPES = sorted(
    path.relative_to(CONF / "experiment").with_suffix("").as_posix() for path in CONF.glob("experiment/**/*.yaml")
)


def has_schema(option: str, folder: Path) -> bool:
    """Whether an option file has a dataclass, or else a target whose signature it matches."""
    loader = start(option, folder, lenient=True).config_loader
    try:
        # Hydra's own loader, because an option may refer to sections of other files.
        cfg = ConfigLoaderImpl.load_configuration(loader, option, [], RunMode.MULTIRUN)  # type: ignore[arg-type]
    finally:
        GlobalHydra.instance().clear()
    node = OmegaConf.select(cfg, option.rpartition("/")[0].replace("/", "."))
    if node is not None and OmegaConf.get_type(node) in schemas().values():
        return True
    if node is None or not node.get("_target_"):
        return False
    check_targets(node, option)
    return True


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_has_a_schema(option):
    assert has_schema(option, CONF), (
        f"conf/{option}.yaml: begin its defaults list with /schema/<name>@_here_, or give it a _target_"
    )


@pytest.mark.parametrize("text", ["depth: 2\n", "defaults: [align, _self_]\nx: 2\n", ""])
def test_an_option_without_a_schema_is_detected(tmp_path, text):
    folder = write_conf(tmp_path / "tree")
    (folder / "stage" / "align.yaml").write_text("trainable: [connector]\n")
    (folder / "stage" / "new.yaml").write_text(text)
    assert has_schema("stage/open", folder)
    assert not has_schema("stage/new", folder)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_with_classes_and_arguments_that_exist(recipe):
    cfg = compose("train", [f"experiment={recipe}"], CONF)  # `mmlab plan` has the same defaults, see its test
    # A recipe may append a value to its name.
    assert cfg.run.name.startswith(recipe.replace("/", "-"))
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check_targets(cfg)


@pytest.mark.parametrize("recipe", ["llava/align_tiny", "ldm/class_tiny", "taming/prior_tiny"])
def test_a_loader_replaces_the_recipe_s(recipe):
    cfg, streamed = (compose("train", [f"experiment={recipe}", *more], CONF) for more in ((), ("data/loader=stream",)))
    assert streamed.data.loader.shuffle and cfg.data.loader is None
    streamed.data.loader = None
    assert streamed.data == cfg.data


def test_a_loader_is_chosen_by_its_name():
    with pytest.raises(ConfigError, match=r"'data/loader' has no option 'strem'\. Did you mean 'stream'"):
        compose("train", ["experiment=llava/align_tiny", "data/loader=strem"])
    with pytest.raises(ConfigError, match="Did you mean 'shuffle'"):
        compose("train", ["experiment=llava/align_tiny", "data/loader=stream", "data.loader.shufle=3"])
    assert compose("train", ["experiment=llava/align_tiny", "data/loader=indexed"]).data.loader._target_ is None


@pytest.mark.parametrize("preset", sorted(path.stem for path in CONF.glob("debug/*.yaml")))
@pytest.mark.parametrize("recipe", RECIPES[:1])
def test_debug_presets_compose_with_recipes(preset, recipe):
    assert compose("train", [f"experiment={recipe}", f"debug={preset}"], CONF).trainer.limit_val_batches == 0


@pytest.mark.parametrize("group", ["trainer", "logger"])
@pytest.mark.parametrize("recipe", RECIPES[:1])
def test_trainers_and_loggers_compose_with_recipes(group, recipe):
    for path in CONF.glob(f"{group}/*.yaml"):
        cfg = compose("train", [f"experiment={recipe}", f"{group}={path.stem}"], CONF)
        check_targets(cfg[group], group)


@pytest.mark.parametrize("root", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_root_names_its_dataclass(root):
    loader = start(root, CONF, lenient=True).config_loader
    kind = root_schema(loader, root)
    GlobalHydra.instance().clear()
    assert kind is not None and kind.__module__.endswith(".config")


def test_a_required_value_of_a_root_is_requested():
    with pytest.raises(ConfigError, match=r"'data\.path' has no value"):
        compose("eval", ["run=x"])


def test_no_config_contains_keys_or_home_folders():
    for path in CONF.rglob("*.yaml"):
        text = path.read_text()
        assert "api_key" not in text.lower() and "/home/" not in text, path
