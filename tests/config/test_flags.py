"""The flags of the verbs: read in any order, refused with a sentence, and accepted by the argparse of Python 3.14."""

import argparse

import pytest

from mmlab.cli import main, verbs
from mmlab.config.errors import ConfigError
from mmlab.config.flags import parse


def test_flags_may_follow_overrides():
    args = parse(["a=b", "--cfg", "job", "c=d", "-p", "run"])
    assert (args.cfg, args.package, args.overrides) == ("job", "run", ["a=b", "c=d"])
    assert parse(["--info", "a=b"]).info == "all"
    assert parse(["a=b", "-m"]).multirun


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--cgf", "job"], "There is no flag '--cgf'. Did you mean '--cfg'?"),
        (["--cfg", "jib"], "invalid choice: 'jib'"),
        (["-m", "--cfg", "job"], "Only one of"),
        (["--resolve"], "--resolve requires --cfg."),
        (["--experimental-rerun", "x.pickle"], "pickle"),
    ],
)
def test_invalid_flags_are_refused(argv, sentence):
    with pytest.raises(ConfigError) as error:
        parse(argv)
    assert sentence in str(error.value)


@pytest.fixture
def argparse_of_python_314(monkeypatch):
    """`add_argument` expands the help text of each argument, as Python 3.14's does, and raises for a bad one."""
    add_argument = argparse._ActionsContainer.add_argument

    def checked(self, *flags, **options):
        action = add_argument(self, *flags, **options)
        if action.help and action.help != argparse.SUPPRESS and "%" in action.help:
            action.help % dict(vars(action), prog="mmlab")
        return action

    monkeypatch.setattr(argparse._ActionsContainer, "add_argument", checked)


@pytest.mark.usefixtures("argparse_of_python_314")
@pytest.mark.parametrize("flag", ["--help", "--hydra-help"])
@pytest.mark.parametrize("verb", verbs())
def test_every_verb_has_help_texts_that_python_314_accepts(verb, flag, capsys):
    try:
        code = main([verb, flag])
    except SystemExit as exited:  # a verb without Hydra: argparse exits itself
        code = exited.code
    assert code in ((0,) if flag == "--help" else (0, 2))
    assert flag == "--hydra-help" or "usage" in (text := capsys.readouterr().out) or "mmlab" in text
