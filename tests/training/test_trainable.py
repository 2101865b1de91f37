import pytest
import torch
from torch import nn

from mmlab.config.errors import ConfigError
from mmlab.training.trainable import count_parameters, set_modes, set_trainable


class Two(nn.Module):
    """A part with dropout and a norm, a part of two layers whose weights are tied, and a number of its own."""

    def __init__(self):
        super().__init__()
        self.eye = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.mouth = nn.ModuleDict({"first": nn.Linear(3, 3), "last": nn.Linear(3, 3, bias=False)})
        self.mouth["last"].weight = self.mouth["first"].weight
        self.scale = nn.Parameter(torch.zeros(1))


def learns(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_named_parts_learn_and_the_rest_is_frozen():
    model = Two()
    assert set_trainable(model, ["mouth"]) == ["eye"]
    assert learns(model) == {"mouth.first.weight", "mouth.first.bias"}
    assert not any(module.training for module in model.eye.modules() if not isinstance(module, nn.Dropout))
    assert model.mouth.training and model.mouth["first"].training


def test_a_dotted_name_lets_a_part_learn_in_part():
    model = Two()
    assert set_trainable(model, ["eye.1"]) == ["mouth"]
    assert learns(model) == {"eye.1.weight", "eye.1.bias"}
    assert (model.eye[0].training, model.eye[1].training) == (False, True)


class Deaf(nn.Module):
    """A part whose first layer no output depends on."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))

    def unused(self):
        return self.layers[0].parameters()


def test_what_is_unused_never_learns():
    model = nn.ModuleDict({"ear": nn.ModuleDict({"inner": Deaf()}), "eye": nn.Linear(2, 2)})
    for names in (["ear"], ["ear.inner"], ["ear.inner.layers"]):
        assert set_trainable(model, names) == ["eye"]
        assert learns(model) == {"ear.inner.layers.1.weight"}
    with pytest.raises(ConfigError, match=r"names 'ear\.inner\.layers\.0', but no output"):
        set_trainable(model, ["eye", "ear.inner.layers.0"])


def test_a_later_choice_replaces_an_earlier_one():
    model = Two()
    set_trainable(model, ["eye", "mouth"])
    assert set_trainable(model, ["eye"]) == ["mouth"]
    assert not learns(model) & {"mouth.first.weight", "mouth.first.bias"}


def test_a_frozen_part_stays_in_eval_mode_whoever_calls_train():
    model = Two()
    set_trainable(model, ["mouth"])
    inputs = torch.randn(4, 2)
    set_modes(model, True)
    assert torch.equal(model.eye(inputs), model.eye(inputs))
    assert model.mouth.training
    set_modes(model, False)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["moth"], r"names 'moth', but the parts are eye, mouth\. Did you mean 'mouth'"),
        (["eye", "mouth.third"], "names 'mouth.third'"),
        ([], "is empty; name at least one of eye, mouth"),
    ],
)
def test_a_name_that_is_no_part_is_refused(names, says):
    with pytest.raises(ConfigError, match=says):
        set_trainable(Two(), names)


@pytest.mark.parametrize(
    ("names", "adapted", "says"),
    [
        (["eye", "mouth", "mouth.first"], "mouth", "names 'mouth.first', but of 'mouth' only an adapter is trained"),
        (
            ["eye", "mouth.first"],
            "mouth.first",
            r"names 'mouth\.first', which is not a part in stage\.train",
        ),
    ],
)
def test_an_adapter_is_of_a_whole_part(names, adapted, says):
    with pytest.raises(ConfigError, match=says):
        set_trainable(Two(), names, [adapted])


def test_parameters_are_counted_per_part_and_tied_ones_once():
    model = Two()
    set_trainable(model, ["mouth"])
    assert count_parameters(model) == {
        "eye": {"trainable": 0, "frozen": 2 * 3 + 3 + 3 + 3},
        "mouth": {"trainable": 3 * 3 + 3, "frozen": 0},
        "own": {"trainable": 0, "frozen": 1},
    }
