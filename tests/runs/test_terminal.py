"""Control characters of others do not reach the terminal."""

import logging
import sys

import click
import pytest
from tqdm import tqdm

from mmlab import cli
from mmlab.runs.terminal import escaped, print_styled, shown_safely

EVIL = "a\x1b[2J\x1b]52;c;YQ==\x07\x9b31m\rb\u202ec\u2066\x00\x7f\ud83d\u2028d"


def test_control_characters_become_text():
    shown = escaped(EVIL)
    assert shown.isprintable() and shown.startswith("a\\x1b[2J\\x1b]52;c;YQ==\\x07\\x9b31m\\rb\\u202ec\\u2066")
    assert escaped("ein\tText,\n猫 👩\u200d🚀 e\u0301") == "ein\tText,\n猫 👩\u200d🚀 e\u0301"


def test_prints_and_logs_are_escaped(capsys):
    with shown_safely():
        print("id", EVIL)
        print(EVIL, file=sys.stderr)
        log = logging.Logger("x")
        log.addHandler(logging.StreamHandler())
        log.warning(EVIL)
    for text in capsys.readouterr():
        assert text and all(line.isprintable() for line in text.split("\n")) and "\\x1b[2J" in text


def test_errors_and_unknown_words_are_escaped(capsys):
    for argv in ([f"verb{EVIL}"], ["score", f"x\x1b[2J={EVIL}"], ["shards", "stats", EVIL.replace("\x00", "")]):
        assert cli.main(argv) == 2 or cli.main(argv) == 1
        text = "".join(capsys.readouterr())
        assert "\\x1b" in text and all(line.isprintable() for line in text.split("\n")), argv


def test_progress_bars_still_move(capsys):
    with shown_safely(), tqdm(total=2, file=sys.stderr, desc="out", mininterval=0) as outer:
        for _ in tqdm(range(2), file=sys.stderr, desc=f"in{EVIL}", mininterval=0):
            outer.update()
    text = capsys.readouterr().err
    assert "\rout" in text and "\x1b[A" in text and "\x1b[2J" not in text and "\\x1b[2J" in text


def test_wandb_keeps_its_colors_and_records_get_none(capsys):
    with shown_safely():
        click.echo("\x1b[34mwandb\x1b[0m: saved", color=True)
        print("\r\x1b[A\x1b[31mred")
    assert capsys.readouterr().out == "\x1b[34mwandb\x1b[0m: saved\n\\r\\x1b[A\\x1b[31mred\n"


def test_styled_texts_are_escaped_and_styled_line_by_line(capsys):
    with shown_safely():
        print_styled([("a\x1b[2J", ""), ("b\n\nc", "\x1b[1m"), ("\n", "\x1b[1m")])
    assert capsys.readouterr().out == "a\\x1b[2J\x1b[1mb\x1b[0m\n\n\x1b[1mc\x1b[0m\n"


def test_secrets_are_not_printed(monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789abc")
    assert cli.main(["score", "predictions=https://me:pa55word@host/sk-0123456789abc", "nothing=1"]) == 2
    text = "".join(capsys.readouterr())
    assert "pa55word" not in text and "0123456789" not in text
    with shown_safely():
        print("a", "https://me:pa55word@host", "sk-0123456789abc")
    assert "pa55word" not in capsys.readouterr().out


def test_the_streams_are_as_before():
    before = sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError), shown_safely():
        assert sys.stdout.fileno() == before[0].fileno() and sys.stdout.encoding
        raise ZeroDivisionError
    assert (sys.stdout, sys.stderr) == before
