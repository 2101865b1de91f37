"""Redaction of secrets: values of keys with a secret name, and values of secret environment variables."""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<redacted>"
# Words of a key: `api_key` hides its value, `max_new_tokens` and `tokenizer` do not.
SECRET_WORDS = {"key", "apikey", "token", "secret", "password", "passwd", "credential", "credentials", "auth"}
SECRET_VARIABLE = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
# Shorter values ("1", "true") occur in ordinary text.
SHORTEST = 6


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
    """Replace the values of secret environment variables, and of `secret_key=…`, in `text`."""
    key, equals, value = text.partition("=")
    if equals and value and "\n" not in text and is_secret_name(key.rpartition(".")[2]):
        return f"{key}={HIDDEN}"
    secrets = {v for name, v in os.environ.items() if SECRET_VARIABLE.search(name) and len(v) >= SHORTEST}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def is_secret_name(key: str) -> bool:
    """Whether one of the key's words marks its value as a secret."""
    return not SECRET_WORDS.isdisjoint(re.split(r"[^a-z]+", key.lower()))
