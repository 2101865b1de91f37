"""Building objects from configs; targets that are not allowed are refused before they are imported."""

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from torch import nn

from mmlab.config.build import build, check_targets, locate
from mmlab.config.errors import ConfigError
from mmlab.model.config import MLPConnectorConfig
from mmlab.model.connector import MLPConnector
from mmlab.training.config import AdamWConfig
from mmlab.training.optim import AdamW

MLP = "mmlab.model.connector.MLPConnector"


def test_a_partial_takes_the_remaining_arguments_later():
    node = OmegaConf.create({"_target_": MLP, "_partial_": True, "depth": 3})
    connector = build(node)(4, 6)
    assert isinstance(connector, MLPConnector) and len(connector.layers) == 5
    assert len(build(node, language_width=6)(4).layers) == 5


def test_a_null_target_builds_nothing():
    assert build(OmegaConf.create({"_target_": None})) is None


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        ({"_target_": MLP, "dept": 1}, "There is no key 'dept'. Did you mean 'depth'?"),
        ({"_target_": MLP, "_args_": [1, 2]}, "There is no key '_args_'. Keys there: depth."),
        (
            {"_target_": "mmlab.model.conector.MLP"},
            "Did you mean 'mmlab.model.connector.MLPConnector'?",
        ),
        (
            {"_target_": "mmlab.model.connector.MLPConector"},
            "Did you mean 'mmlab.model.connector.MLPConnector'?",
        ),
        ({"_target_": 3}, "must be a dotted name"),
        ({"_target_": "mmlab.model.connector.MLPConnector()"}, "must be a dotted name"),
        ({"_target_": "lightning.pytorch.callbacks.ModelCheckpont"}, "callbacks.ModelCheckpoint'?"),
    ],
)
def test_invalid_targets_and_keys_are_refused(node, sentence):
    with pytest.raises(ConfigError) as error:
        build(node)
    assert sentence in str(error.value)


def test_the_error_of_a_nested_part_is_not_wrapped():
    """Hydra would wrap it into an exception of its own, which users see as a traceback."""
    part = {"_target_": "mmlab.model.conditioner.ClassCondition", "classes": [], "width": 4}
    parts = {"first_stage": {"_target_": "mmlab.model.first_stage.Identity"}, "conditioner": part}
    denoiser = {"_target_": "mmlab.model.dit.DiT", "_partial_": True}
    with pytest.raises(ConfigError, match=r"^model\.conditioner\.classes=\[\] must be their number"):
        build({"_target_": "mmlab.model.denoiser.DiffusionModel", **parts, "denoiser": denoiser})


def test_invalid_arguments_are_found_at_any_depth_before_building():
    node = {"_target_": "mmlab.model.vlm.VisionLanguageModel", "connector": {"_target_": MLP, "dept": 2}}
    with pytest.raises(ConfigError, match=r"^There is no key 'model.connector.dept'. Did you mean 'depth'"):
        check_targets(node, "model")
    check_targets([{"x": [{"_target_": MLP, "depth": 1}]}])


def test_our_classes_take_settings_first_and_parts_by_name():
    head = {"_target_": "mmlab.model.language.LanguageOnly"}
    assert build(head, language=nn.Linear(1, 1)).language.weight.shape == (1, 1)  # no settings of its own
    optim = build(AdamWConfig(lr=0.5))
    assert isinstance(optim, AdamW) and build(OmegaConf.structured(AdamWConfig(lr=0.25))).config.lr == 0.25


def test_settings_constructed_in_python_are_checked():
    with pytest.raises(ConfigError, match=r"'schedule' cannot be 'cosin'\. Did you mean 'cosine'\?"):
        AdamWConfig(schedule="cosin")
    with pytest.raises(ConfigError, match="'lr' must be above 0, not -1"):
        AdamWConfig(lr=-1)


GADGETS = [
    "os.system",
    "subprocess.run",
    "builtins.eval",
    "io.open",
    "pickle.loads",
    "functools.partial",
    "hydra.utils.get_method",
    "hydra.utils.instantiate",
    "torch.load",
    "torch.hub.load",
    "numpy.load",
    "pandas.read_pickle",
    "transformers.AutoModel.from_pretrained",
    "lightning.pytorch.callbacks.Callback",
    "lightning.os.system",
    "mmlab.config.build.build",
    "mmlab.cli.main",
    "mmlabx.evil.Thing",
    # names with an allowed beginning
    "mmlab.data.index.os.system",
    "mmlab.data.index.Path",
    "mmlab.model.connector.nn.Linear",
    "mmlab.model..connector.MLPConnector",
    "mmlab.model.vision._layers",
]


@pytest.mark.parametrize("gadget", GADGETS)
@pytest.mark.parametrize("nested", [False, True])
def test_dangerous_targets_are_refused(gadget, nested):
    bad = {"_target_": gadget}
    with pytest.raises(ConfigError):
        build({"_target_": MLP, "depth": [{"x": bad}]} if nested else bad)


@pytest.mark.parametrize("module", ["torch", "numpy", "pandas", "wandb", "sqlite3", "telnetlib"])
def test_a_refused_module_is_never_imported(module):
    code = f"""
import sys
from mmlab.config.build import build
from mmlab.config.errors import ConfigError
assert "{module}" not in sys.modules
try:
    build({{"_target_": "{MLP}", "depth": {{"_target_": "{module}.load"}}}})
except ConfigError:
    sys.exit("{module}" in sys.modules or "mmlab.model.connector" in sys.modules)
sys.exit(3)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_interpolated_target_is_refused():
    cfg = OmegaConf.create({"a": "os.system", "b": {"_target_": "${a}", "command": "true"}})
    with pytest.raises(ConfigError, match=r"os\.system' is not allowed"):
        build(cfg.b)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A user's own package."""
    package = tmp_path / "mylab"
    package.mkdir()
    (package / "__init__.py").write_text("from mylab.parts import Thing\n")
    (package / "parts.py").write_text(
        "import os\nclass Thing:\n    def __init__(self, size=1):\n        self.size = size\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == "mylab"]:
        del sys.modules[name]


def test_a_users_package_must_be_allowed(lab, monkeypatch):
    with pytest.raises(ConfigError, match="MMLAB_ALLOW_TARGETS"):
        build({"_target_": "mylab.parts.Thing", "size": 3})
    assert "mylab" not in sys.modules
    monkeypatch.setenv("MMLAB_ALLOW_TARGETS", "other, mylab.")
    assert build({"_target_": "mylab.parts.Thing", "size": 3}).size == 3
    assert build({"_target_": "mylab.Thing"}).size == 1
    part = [{"a": 1}]  # passed as it is, not as a config
    assert build({"_target_": "mylab.Thing", "size": 2}, size=part).size is part
    with pytest.raises(ConfigError, match=r"no argument 'sise'\. Did you mean 'size'"):
        build({"_target_": "mylab.Thing", "sise": 3})
    with pytest.raises(ConfigError):
        build({"_target_": "mylab.parts.os.system"})
    with pytest.raises(ConfigError):
        build({"_target_": "mylabs.Thing"})


def test_a_missing_dependency_is_not_reported_as_a_missing_module(lab, monkeypatch):
    (lab / "needs.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.setenv("MMLAB_ALLOW_TARGETS", "mylab")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        locate("mylab.needs.Thing")


def test_nothing_calls_instantiate():
    package = Path(build.__code__.co_filename).parents[1]
    assert [path for path in package.rglob("*.py") if "instantiate(" in path.read_text()] == []


OWN = """
from torch import nn

from mmlab.model.connector import MLPConnector


class Deeper(MLPConnector):
    pass


class Plain(nn.Module):
    def __init__(self, vision_width, language_width, rank=2):
        super().__init__()
        self.rank = rank


class Head(nn.Module):
    def __init__(self, connector, names=()):
        super().__init__()
        self.connector, self.names = connector(4, 6), names
"""


@pytest.fixture
def own(lab, monkeypatch):
    (lab / "own.py").write_text(OWN)
    monkeypatch.setenv("MMLAB_ALLOW_TARGETS", "mylab")


def test_a_users_class_gets_parts_of_ours_built(own):
    node = {"_target_": "mylab.own.Head", "connector": {"_target_": MLP, "_partial_": True, "depth": 3}, "names": ["a"]}
    for head in (build(node), build(OmegaConf.create(node))):
        assert isinstance(head.connector, MLPConnector) and len(head.connector.layers) == 5 and head.names == ["a"]


def test_a_subclass_of_ours_gets_the_settings_of_its_base(own):
    node = {"_target_": "mylab.own.Deeper", "_partial_": True, "depth": 3}
    connector = build(node)(4, 6)
    assert type(connector).__name__ == "Deeper" and len(connector.layers) == 5
    typed = OmegaConf.merge(OmegaConf.structured(MLPConnectorConfig), {"_target_": "mylab.own.Deeper"})
    assert len(build(typed)(4, 6).layers) == 3
    with pytest.raises(ConfigError, match=r"There is no key 'dept'. Did you mean 'depth'"):
        build({"_target_": "mylab.own.Deeper", "dept": 3})


def test_a_users_class_in_a_section_of_ours_ignores_its_untouched_defaults(own):
    typed = OmegaConf.merge(OmegaConf.structured(MLPConnectorConfig), {"_target_": "mylab.own.Plain"})
    assert build(typed)(4, 6).rank == 2
    with pytest.raises(ConfigError, match="takes no argument 'depth'"):
        build(OmegaConf.merge(typed, {"depth": 3}))


def test_settings_of_another_class_are_refused():
    linear = {"_target_": "mmlab.model.connector.LinearConnector"}
    typed = OmegaConf.merge(OmegaConf.structured(MLPConnectorConfig), linear)
    with pytest.raises(ConfigError, match=r"'model.connector._target_' is .*LinearConnector, but the section"):
        check_targets(typed, "model.connector")


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_not_collected_while_classes_are_imported(tmp_path, monkeypatch, enabled):
    name = f"lab_{enabled}".lower()
    (tmp_path / f"{name}.py").write_text("import gc\n\nclass Part:\n    collected = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MMLAB_ALLOW_TARGETS", name)
    (gc.enable if enabled else gc.disable)()
    try:
        part: Any = locate(f"{name}.Part")
        assert not part.collected and gc.isenabled() == enabled
        with pytest.raises(ConfigError, match="there is no module"):
            locate(f"{name}.missing.Part")
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
