"""Redaction of secrets in what is written, logged and printed.

Secrets are
- the values of config keys with a secret name (`api_key`, `token`, `password`, …);
- the values of environment variables with a secret name (`OPENAI_API_KEY`, `DB_PASS`, `MY_PAT`), unless the value is a
  path, a common word or short;
- user and password in a URL, wherever it stands, and the whole value of a variable that is such a URL;
- texts in the form of well-known tokens (`ghp_…`, `sk-…`), and what a line of code or a shell assigns to a secret name.

A secret is also found in the spellings of JSON and of URLs (`\\u0073`, `%73`).
"""

import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

HIDDEN = "<redacted>"
# Words of a key: `api_key` hides its value, `max_new_tokens` and `tokenizer` do not.
SECRET_WORDS = {"key", "apikey", "token", "secret", "password", "passwd", "pass", "pat", "credential", "credentials"}
SECRET_WORDS |= {"auth", "passphrase", "dsn"}
# Words of a variable may be joined: MYAPIKEY, GHTOKEN.
SECRET_VARIABLE = re.compile(
    r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH(?!OR)|(^|_)(PAT|DSN|PW|PWD)(_|$)|DATABASE_URL", re.IGNORECASE
)
# The last word of names whose values are no secrets, though another word is secret: SSH_KEY_DIR, TOKEN_TYPE.
HARMLESS = {"dir", "path", "file", "folder", "home", "root", "sock", "socket", "type", "mode", "name", "host", "port"}
HARMLESS |= {"method", "provider", "backend", "ttl", "parallelism", "layout", "id_file", "limit", "length"}
COMMON = {"disabled", "enabled", "required", "optional", "default", "password", "changeme", "development", "production"}
# Shorter values ("1", "true") occur in ordinary text.
SHORTEST = 6
DEEPEST = 15  # backslashes before a character of JSON within JSON within …
LONG = 12  # characters from which a secret is also found within a longer word

# All of these read a text in linear time, because endpoints and records write what is redacted.
# `user:password@`, of which the user stays, or a long token in its place; neither goes past the next URL.
_USERINFO = re.compile(
    r"""(?<=://)(?:(?P<user>[^\s/@:'"<>]*:)(?!\d+[/?#])(?P<password>(?:(?!://)[^\s'"<>,])+)"""
    r"""|(?P<token>[^\s/@:'"<>]{12,}))(?=@)"""
)
_TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|hf_[A-Za-z0-9]{20,}"
    r"|sk-[A-Za-z0-9_-]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}|AKIA[A-Z0-9]{16}|AIza[\w-]{30,}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})(?![A-Za-z0-9])"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
# A name is read from its start only: from every word in it, a long line would take hours.
_NAME = r"[\w.-]*(?:key|token|secret|passw(?:or)?d|passphrase|pass|pat|credentials?)"
_ASSIGNED = re.compile(
    rf"""(?im)((?<![\w.-])(?P<name>{_NAME})["']?\]?\s*[:=]\s*[rfb]?(?P<quote>["']))(?P<quoted>[^"'\n]+)(?=(?P=quote))"""
    rf"""|(^[ +-]?[ \t]*(?:export[ \t]+)?(?P<variable>[A-Z][A-Z0-9_]*)\s*[:=]\s*)(?P<plain>[^\s"'(){{}}\[\],]+)\s*$"""
)


def redact(value: Any, key: str = "") -> Any:
    """Return plain data with its secrets replaced; `key` is the name under which `value` is stored."""
    if isinstance(value, Mapping):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(v, key) for v in value]
    if isinstance(value, str):
        return HIDDEN if value and is_secret_name(key) else redact_text(value)
    return value


def redact_text(text: str) -> str:
    """Replace the secrets in `text`; if it is `key=value` with a secret key, the whole value."""
    key, equals, value = text.partition("=")
    if equals and value and "\n" not in text and is_secret_name(key.rpartition(".")[2]):
        return f"{key}={HIDDEN}"
    return _ASSIGNED.sub(_without_value, hide_known(text))


def hide_known(text: str) -> str:
    """Replace secrets that are known by their value or form: of the environment, in URLs, and well-known tokens."""
    if "://" in text:
        text = _USERINFO.sub(lambda match: f"{match['user'] or ''}{HIDDEN}", text)
    return hide(_TOKENS.sub(HIDDEN, text), secrets_of(os.environ))


def hide(text: str, secrets: Iterable[str]) -> str:
    """Replace secrets in `text`, also in the spellings of JSON and URLs."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = _spellings(secret).sub(HIDDEN, text)
    return text


def secrets_of(environment: Mapping[str, str]) -> set[str]:
    """The secrets among the values of environment variables."""
    secrets: set[str] = set()
    for name, value in environment.items():
        if SECRET_VARIABLE.search(name) and is_secret_value(name, value):
            secrets.add(value)
        if "://" in value and (match := _USERINFO.search(value)):
            own = match["password"] or match["token"]
            secrets |= {value, *([own] if len(own) >= SHORTEST else [])}
    return secrets


def is_secret_value(name: str, value: str) -> bool:
    """Whether the value of a variable with a secret name is a secret; paths and common words occur in ordinary text."""
    value = value.strip()
    last = re.split(r"[^a-z]+", name.lower())[-1]
    if len(value) < SHORTEST or last in HARMLESS or value.lower() in COMMON:
        return False
    if os.path.exists(os.path.expanduser(value)) or (
        re.match(r"(~|\.{0,2})/[\w.-]+(/|$)|[A-Z]:\\", value)
        and not (
            len(value) >= 20 and re.search(r"\d", value) and re.search(r"[A-Z]", value) and re.search(r"[a-z]", value)
        )
    ):
        return False
    if value.isdigit():
        return len(value) >= LONG - 2
    return not (value.isalpha() and len(value) < 9)


def is_secret_name(key: str) -> bool:
    """Whether one of the key's words marks its value as a secret."""
    words = re.split(r"[^a-z]+", key.lower())
    return not SECRET_WORDS.isdisjoint(words) and words[-1] not in HARMLESS


def _without_value(match: re.Match) -> str:
    name, value = match["name"] or match["variable"], match["quoted"] or match["plain"]
    words = re.split(r"[^a-z]+", name.lower().strip("-."))
    secret = is_secret_name(name) and words != ["key"] if match["name"] else bool(SECRET_VARIABLE.search(name))
    if not secret or not is_secret_value(name, value) or value.isalpha() or value.startswith(("$", HIDDEN)):
        return match[0]
    return f"{match[1] or match[5]}{HIDDEN}"


@lru_cache(maxsize=1024)
def _spellings(secret: str) -> re.Pattern:
    """A pattern of a secret in which each character may be written as in JSON or in a URL."""
    parts = []
    for character in secret:
        codes = [rf"\\{{1,{DEEPEST}}}u{number:04x}" for number in _utf16(character)]
        escaped = "".join(f"%{byte:02x}" for byte in character.encode("utf-8", "replace"))
        parts.append(rf"(?:\\{{0,{DEEPEST}}}{re.escape(character)}|(?i:{''.join(codes)})|(?i:{escaped}))")
    if len(secret) >= LONG:
        return re.compile("".join(parts))
    return re.compile(rf"(?<![A-Za-z0-9]){''.join(parts)}(?![A-Za-z0-9])")


def _utf16(character: str) -> list[int]:
    data = character.encode("utf-16-be", "surrogatepass")
    return [int.from_bytes(data[i : i + 2]) for i in range(0, len(data), 2)]
