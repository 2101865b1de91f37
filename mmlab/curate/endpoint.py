"""Client of a chat-completions endpoint (OpenAI, vLLM, llama.cpp, …) that handles its faults.

The key is read from the environment and is sent in one header; it is never stored, logged or sent to a redirect's
target. The official client limits the silence of a server but not the duration of a call, and sends organization,
project and custom headers from the environment to any address.
"""

import email.utils
import http.client
import ipaddress
import json
import math
import os
import random
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn
from urllib.parse import urlsplit

from mmlab.config.errors import ConfigError
from mmlab.curate import deadline
from mmlab.curate.client import UNUSABLE, Message, NoReply, Refused, Reply
from mmlab.curate.config import EndpointConfig
from mmlab.curate.pace import Pace
from mmlab.runs.disk import to_json
from mmlab.runs.redact import hide, redact_text

LONGEST_WAIT = 600.0  # seconds; a longer Retry-After is shortened to this
LONGEST_BODY = 8 << 20  # bytes
SHORTEST_KEY = 12  # characters; a shorter key is a placeholder such as "test", which replies may contain as a word
RESERVED = ("model", "messages", "stream", "n")


@dataclass(eq=False)
class TransientFault(Exception):
    """A fault that may not occur again, so that the request is retried."""

    reason: str  # a few words, under which such faults are counted
    after: float | None = None  # seconds to wait, if the endpoint states them
    usage: tuple[int, int] | None = None  # prompt and completion tokens of an unusable reply; None: there was none


class Endpoint:
    """An endpoint that speaks the chat-completions protocol.

    Requests that end in 408, 409, 425, 429 (whose Retry-After is respected), 5xx, a timeout, a broken connection, a
    malformed reply or an empty one are retried with exponential backoff and jitter. A wrong key, address or model is
    an error at once.

    Args:
        config: settings.

    Raises:
        ConfigError: no HTTP address, a key that is not set or would be sent unencrypted, or settings that the protocol
            reserves.
    """

    def __init__(self, config: EndpointConfig):
        self.config = config
        self.model = config.model
        self.settings = config.settings
        if reserved := sorted(set(RESERVED) & self.settings.keys()):
            raise ConfigError(f"llm.settings cannot contain '{reserved[0]}': it is set for each request.")
        self._key = (os.environ.get(config.variable) or "").strip() or None if config.variable else None
        self._url = _checked(config.url, self._key, config.variable)
        self._pace = Pace(config.requests_per_minute)
        # Requests to this machine, and the key with them, must not pass through a proxy.
        direct = [urllib.request.ProxyHandler({})] if _is_loopback(urlsplit(config.url).hostname or "") else []
        self._opener = urllib.request.build_opener(_NoRedirect, *deadline.handlers(), *direct)

    def complete(self, messages: Sequence[Message], stop: threading.Event | None = None) -> Reply:
        """Request a reply, with retries; if the last attempt is empty, the reply has `finish="empty"`.

        Args:
            messages: the dialogue.
            stop: once set, no attempt is started; one in flight is awaited, because it is billed anyway.

        Raises:
            NoReply: all attempts failed, or the endpoint rejects this prompt.
            Refused: the endpoint rejects every prompt.
        """
        stop = stop or threading.Event()
        body = to_json({"model": self.model, "messages": list(messages), **self.settings}).encode()
        faults: list[TransientFault] = []
        while len(faults) < self.config.attempts:
            self._pace.wait(stop)
            if stop.is_set():
                raise NoReply("stopped", f"the request to {self._url} was canceled.")
            try:
                reply = self._answer(self._post(body))
            except TransientFault as fault:
                faults.append(fault)
                if len(faults) < self.config.attempts:
                    self._rest(fault, len(faults) - 1, stop)
                continue
            return self._spent(faults, reply)
        spent = self._spent(faults)
        if faults[-1].usage is not None:
            return spent
        retries = Counter(fault.reason for fault in faults).most_common()
        counted = ", ".join(f"{reason} ({times}x)" for reason, times in retries)
        down = all(fault.usage is None for fault in faults)
        raise NoReply(
            retries[0][0],
            f"no reply from {self._url} in {self.config.attempts} attempts: {counted}.",
            down=down,
            spent=None if down else spent,
        )

    def _spent(self, faults: Sequence[TransientFault], reply: Reply | None = None) -> Reply:
        """Add the tokens of the failed attempts to a reply, or to an empty one."""
        reply = reply or Reply("", "empty", model=self.model)
        usage = [fault.usage for fault in faults if fault.usage is not None]
        return replace(
            reply,
            prompt_tokens=reply.prompt_tokens + sum(prompt for prompt, _ in usage),
            completion_tokens=reply.completion_tokens + sum(completion for _, completion in usage),
            retries=dict(Counter(fault.reason for fault in faults)),
        )

    def _rest(self, fault: TransientFault, attempt: int, stop: threading.Event) -> None:
        """Wait before the next attempt; a Retry-After holds the other threads as well."""
        seconds = min(self.config.backoff * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
        if fault.after is not None:
            self._pace.hold(min(fault.after, LONGEST_WAIT))
            seconds *= 0.5
        stop.wait(seconds)

    def _post(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "mmlab"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self._url}/chat/completions", body, headers, method="POST")

        def send(cut: deadline.Cut) -> str:
            request.cut = cut  # type: ignore[attr-defined]
            return self._send(request)

        try:
            return deadline.call(send, self.config.timeout)
        except TimeoutError:
            raise TransientFault("timeout") from None

    def _send(self, request: urllib.request.Request) -> str:
        try:
            with self._opener.open(request, timeout=self.config.timeout) as response:
                return self._clean(_read(response))
        except urllib.error.HTTPError as error:
            with error:
                self._status(error)
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise Refused(f"The certificate of {self._url} is invalid: {error.reason.verify_message}.") from None
            raise TransientFault("timeout" if isinstance(error.reason, TimeoutError) else "no connection") from None
        except TimeoutError:
            raise TransientFault("timeout") from None
        except (OSError, http.client.HTTPException):
            raise TransientFault("broken connection") from None

    def _status(self, error: urllib.error.HTTPError) -> NoReturn:
        """Raise the error of a status other than 2xx."""
        code = error.code
        if code in (408, 409, 425, 429) or code >= 500:
            raise TransientFault(str(code), _seconds(error.headers.get("Retry-After")))
        try:
            body = self._clean(_read(error))
        except (OSError, http.client.HTTPException, TransientFault):
            body = ""
        sentence = f"{self._url} returned {code}{_complaint(body)}."
        if code in (400, 413, 422):
            raise NoReply(str(code), sentence)
        if code in (401, 403):
            sentence += " Check the key in the environment variable that llm.variable names."
        elif code == 404:
            sentence += " Check llm.url and llm.model."
        raise Refused(sentence)

    def _answer(self, body: str) -> Reply:
        """Parse the endpoint's JSON."""
        try:
            data = json.loads(body)
            choice = data["choices"][0]
            text = choice["message"]["content"]
            counts = data.get("usage") or {}
            usage = int(counts.get("prompt_tokens") or 0), int(counts.get("completion_tokens") or 0)
            finish, model = str(choice.get("finish_reason") or "stop"), str(data.get("model") or self.model)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise TransientFault("garbage") from None
        if text is not None and not isinstance(text, str):
            raise TransientFault("garbage", usage=usage)
        text = _encodable(text or "").strip()
        if not text and finish not in UNUSABLE:
            raise TransientFault("empty answer", usage=usage)
        return Reply(text, _encodable(finish), *usage, model=_encodable(model))

    def _clean(self, data: bytes) -> str:
        """Decode a body and hide the key, which an endpoint may echo in any spelling that JSON or a URL allows."""
        text = data.decode("utf-8", "replace")
        return hide(text, [self._key]) if self._key and len(self._key) >= SHORTEST_KEY else text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would send the key to another host."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


def _checked(url: str, key: str | None, variable: str | None) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"llm.url must be an address such as https://api.openai.com/v1, not '{redact_text(url)}'.")
    if parts.username or parts.password or parts.query:
        raise ConfigError("llm.url contains a user, a password or a query; put the key into the environment.")
    if variable is not None and key is None and not _is_loopback(parts.hostname):
        raise ConfigError(f"{variable} is not set; set it, or use llm.variable=null.")
    if key and parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise ConfigError(
            f"The key in {variable} would be sent unencrypted to {parts.hostname}; use https or llm.variable=null."
        )
    if key and not (key.isascii() and key.isprintable()):
        raise ConfigError(f"The key in {variable} contains characters that are invalid in a header.")
    return url.rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _encodable(text: str) -> str:
    """Replace lone surrogates: JSON can encode half of a truncated emoji, UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _read(response: Any) -> bytes:
    """Read a body, up to a size that no reply has."""
    data = b""
    while piece := response.read1(1 << 16):
        data += piece
        if len(data) > LONGEST_BODY:
            raise TransientFault("garbage")
    return data


def _seconds(retry_after: str | None) -> float | None:
    """Convert a Retry-After header, a number or a date, to seconds from now; None if it is neither."""
    if not retry_after:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _complaint(body: str) -> str:
    """Extract the message of an error response, or its whole text, as one line."""
    try:
        data = json.loads(body)
        fault = data.get("error", data.get("detail", body)) if isinstance(data, dict) else body
        body = str(fault.get("message", fault)) if isinstance(fault, dict) else str(fault)
    except ValueError:
        pass
    line = redact_text(" ".join(body.split()))[:200].rstrip(".")
    return f": {line}" if line else ""
