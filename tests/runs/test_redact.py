"""What is a secret, where it is found, and what is left alone."""

import json
import time
from urllib.parse import quote

import pytest

from mmlab.runs.redact import HIDDEN, hide, redact, redact_text, secrets_of

SECRET = "pl4in/Secret+0123"


@pytest.mark.parametrize(
    "name",
    ["DB_PASS", "GITHUB_PAT", "MY_PAT", "PGPASSWORD", "GHTOKEN", "OPENAI_API_KEY", "CLIENT_SECRET", "SENTRY_DSN"]
    + ["aws_secret_access_key", "DATABASE_URL", "SMTP_PW", "BASIC_AUTH", "SSH_KEY_PASSPHRASE"],
)
def test_the_values_of_variables(name, monkeypatch):
    monkeypatch.setenv(name, SECRET)
    assert redact({"tags": ["a", f"run-{SECRET}"]}) == {"tags": ["a", f"run-{HIDDEN}"]}


def test_a_word_that_is_a_password(monkeypatch):
    monkeypatch.setenv("DB_PASS", "swordfish")
    assert redact_text("swordfish, and swordfishing") == f"{HIDDEN}, and swordfishing"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SSH_KEY_DIR", "/some/path"),
        ("SSH_KEY_DIR", "runs"),
        ("KEY_STORE", "/mnt/data/keys"),
        ("SECRET_KEYS", "~/keys/mine"),
        ("API_KEY", "true"),
        ("API_KEY", "disabled"),
        ("TOKEN_TYPE", "bearertoken"),
        ("TOKEN_TTL", "8640000"),
        ("AUTH_PORT", "123456789012"),
        ("GIT_AUTHOR_EMAIL", "ada@lovelace.org"),
        ("TOKENIZERS_PARALLELISM", "falsefalse"),
        ("KEYBOARD", "german"),
        ("OLDPWD", "/root/there"),
    ],
)
def test_paths_words_and_short_values_are_no_secrets(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    text = f"run.root={value} {value}/shards x{value}"
    assert redact_text(text) == text


def test_a_base64_key_that_looks_like_a_path():
    key = "/wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
    assert secrets_of({"AWS_SECRET_ACCESS_KEY": key}) == {key}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=https://me:pa55@host/x", f"a=https://me:{HIDDEN}@host/x"),
        ("postgresql+psycopg2://u:p@ss:w/rd@db:5432/x", f"postgresql+psycopg2://u:{HIDDEN}@db:5432/x"),
        ("https://0123456789abcdef@github.com/x", f"https://{HIDDEN}@github.com/x"),
        ("ssh://git@github.com/x", None),
        ("https://host:8080/x@v1 and a@b.c", None),
        ("https://host/me@v1", None),
    ],
)
def test_urls(text, expected):
    assert redact_text(text) == (expected or text)


def test_a_url_of_the_environment():
    secrets = secrets_of({"WHATEVER": "redis://:hunter22@host/0", "HOME_PAGE": "https://host/a"})
    assert secrets == {"redis://:hunter22@host/0", "hunter22"}


@pytest.mark.parametrize(
    "line",
    [
        '+    api_key = "abcd1234efgh"',
        "+    client = Client(token='abcd1234efgh')",
        '+ os.environ["OPENAI_API_KEY"] = "abcd1234efgh"',
        '+  "db_password": "abcd1234efgh",',
        "+export MY_PAT=abcd1234efgh",
        "+DB_PASS=abcd1234efgh",
        "+hf = login(hf_abcd1234efghabcd1234efgh)",
        "+see ghp_abcd1234efghabcd1234efgh.",
        "+-----BEGIN RSA PRIVATE KEY-----\n+abcd1234efgh\n+-----END RSA PRIVATE KEY-----",
    ],
)
def test_a_diff_with_a_secret(line):
    text = redact({"diff": f"--- a/x.py\n+++ b/x.py\n{line}\n unchanged\n"})["diff"]
    assert "1234" not in text and HIDDEN in text and text.endswith("\n unchanged\n")


@pytest.mark.parametrize(
    "line",
    [
        '+    key = "val/loss"',
        '+    pad_token = "<pad>"',
        '+    rows.sort(key="caption")',
        '+    eos_token="endoftext"',
        "+SECRET_WORDS = {",
        "+    tokens = tokenizer(text)",
        "+KEY = keyed(seed)",
        '+    name = "abcd1234efgh"',
    ],
)
def test_a_diff_without_one_stays(line):
    assert redact({"diff": f"x\n{line}\n"})["diff"] == f"x\n{line}\n"


@pytest.mark.parametrize("secret", [SECRET, 'quo"te\\d-0123', "kläger-0123-猫"])
def test_other_spellings(secret):
    everywhere = "".join(f"\\u{ord(c):04x}" for c in secret)
    for text in (
        secret,
        json.dumps(secret),
        json.dumps(json.dumps(secret)),
        quote(secret),
        quote(secret, ""),
        everywhere,
    ):
        assert hide(f"a {text} b", [secret]).replace('"', "").replace("\\", "") == f"a {HIDDEN} b", text


LONG = ["1.5-2.3-" * 9000, "a" * 70000, "token " * 10000, "\n" * 70000, "\\" * 70000, "://" * 30000, "://a:" * 20000]


@pytest.mark.parametrize("line", LONG, ids=["numbers", "word", "words", "empty", "escapes", "urls", "users"])
def test_a_long_line_takes_no_longer_than_many_short_ones(line, monkeypatch):
    monkeypatch.setenv("DB_PASS", SECRET)
    start = time.process_time()
    assert redact_text(f"diff\n+{line}\n") == f"diff\n+{line}\n"
    assert time.process_time() - start < 5


@pytest.mark.parametrize("name", ["api_key", "-api_key", "self.api-key", "--api-key", "settings.API_KEY"])
def test_names_within_longer_ones(name):
    assert redact_text(f"\n{name} = 'pl4inSecret'\n") == f"\n{name} = '{HIDDEN}'\n"
    assert redact_text("\n-key = 'pl4inSecret'\n") == "\n-key = 'pl4inSecret'\n"  # such as of a dict
