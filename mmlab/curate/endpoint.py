"""A chat-completions endpoint over HTTP (the protocol of OpenAI, vLLM, llama.cpp, …), with everything that it may do.

The key is read from the environment and goes into one header. It is not kept, logged or sent along a redirect.
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
from dataclasses import replace
from typing import Any, NoReturn
from urllib.parse import urlsplit

from mmlab.config.errors import ConfigError
from mmlab.config.redact import HIDDEN, redact_text
from mmlab.curate.client import UNUSABLE, Message, NoReply, Refused, Reply
from mmlab.curate.pace import Pace

LONGEST_WAIT = 600.0  # seconds; an endpoint that asks for more is asked again after this
LONGEST_BODY = 8 << 20  # bytes
SHORTEST_KEY = 12  # characters; a shorter one is a dummy, and its letters may be those of a word
OURS = ("model", "messages", "stream", "n")


class Again(Exception):
    """A fault that may pass.

    Args:
        reason: a few words.
        after: seconds that the endpoint asks to wait.
        usage: tokens of an answer that was paid for all the same, of the prompt and of the answer; None: there was
            no answer.
    """

    def __init__(self, reason: str, after: float | None = None, usage: tuple[int, int] | None = None):
        super().__init__(reason)
        self.reason = reason
        self.after = after
        self.usage = usage


class Endpoint:
    """Any endpoint that speaks the chat-completions protocol.

    429 (with its Retry-After), 5xx, time-outs, broken connections, garbage and empty answers are asked again,
    later each time and with jitter; a wrong key, address or model stops at once.

    Args:
        url: base, such as `https://api.openai.com/v1`; `/chat/completions` is added.
        model: name that the endpoint knows it by.
        variable: environment variable that holds the key; None sends none.
        settings: sent along as they are, such as temperature and max_tokens.
        timeout: seconds that the endpoint may be silent; an answer of which more still comes when the request is
            older than that is given up as well.
        attempts: how often one question is asked before it is given up.
        backoff: seconds before the second attempt; doubled each time.
        requests_per_minute: None sets no limit.

    Raises:
        ConfigError: no HTTP address, a key that is not set or would travel unencrypted, or settings that the protocol
            reserves.
    """

    def __init__(
        self,
        url: str,
        model: str,
        variable: str | None = "OPENAI_API_KEY",
        settings: dict[str, Any] | None = None,
        timeout: float = 120.0,
        attempts: int = 6,
        backoff: float = 1.0,
        requests_per_minute: float | None = None,
    ):
        self.model = model
        self.settings = dict(settings or {})
        self.timeout, self.attempts, self.backoff = timeout, attempts, backoff
        if reserved := sorted(set(OURS) & self.settings.keys()):
            raise ConfigError(f"llm.settings has no place for '{reserved[0]}': it is set for each question.")
        self._key = None if variable is None else (os.environ.get(variable) or "").strip() or None
        self._url = _checked(url, self._key, variable)
        self._pace = Pace(requests_per_minute)
        # What goes to this machine is for no proxy to see, the key least of all.
        direct = [urllib.request.ProxyHandler({})] if _is_loopback(urlsplit(url).hostname or "") else []
        self._opener = urllib.request.build_opener(_NoRedirect, *direct)

    def complete(self, messages: Sequence[Message], stop: threading.Event | None = None) -> Reply:
        """Ask until there is an answer; one that is empty each time is a reply with `finish` empty.

        Args:
            messages: the dialogue.
            stop: when it is set, there is no further attempt; one that is on its way is waited for, as it is paid.

        Raises:
            NoReply: there was none after all attempts, or the endpoint does not take this prompt.
            Refused: it takes none.
        """
        stop = stop or threading.Event()
        body = json.dumps({"model": self.model, "messages": list(messages), **self.settings}).encode()
        faults: list[Again] = []
        while len(faults) < self.attempts:
            self._pace.wait(stop)
            if stop.is_set():
                raise NoReply("stopped", f"{self._url} was not asked any more.")
            try:
                reply = self._answer(self._post(body))
            except Again as fault:
                faults.append(fault)
                if len(faults) < self.attempts:
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
            f"no answer from {self._url} in {self.attempts} attempts: {counted}.",
            down=down,
            spent=None if down else spent,
        )

    def _spent(self, faults: Sequence[Again], reply: Reply | None = None) -> Reply:
        """A reply, or an empty one, with what the attempts before it cost."""
        reply = reply or Reply("", "empty", model=self.model)
        usage = [fault.usage for fault in faults if fault.usage is not None]
        return replace(
            reply,
            prompt_tokens=reply.prompt_tokens + sum(prompt for prompt, _ in usage),
            completion_tokens=reply.completion_tokens + sum(completion for _, completion in usage),
            retries=dict(Counter(fault.reason for fault in faults)),
        )

    def _rest(self, fault: Again, attempt: int, stop: threading.Event) -> None:
        """Wait before the next attempt; where the endpoint itself asked for it, all threads wait."""
        seconds = min(self.backoff * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
        if fault.after is not None:
            self._pace.hold(min(fault.after, LONGEST_WAIT))
            seconds *= 0.5
        stop.wait(seconds)

    def _post(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "mmlab"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self._url}/chat/completions", body, headers, method="POST")
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return self._clean(_read(response, deadline))
        except urllib.error.HTTPError as error:
            with error:
                self._status(error)
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise Refused(f"{self._url} cannot prove who it is: {error.reason.verify_message}.") from None
            raise Again("timeout" if isinstance(error.reason, TimeoutError) else "no connection") from None
        except TimeoutError:
            raise Again("timeout") from None
        except (OSError, http.client.HTTPException):
            raise Again("broken connection") from None

    def _status(self, error: urllib.error.HTTPError) -> NoReturn:
        """Sort an answer that is none by its status."""
        code = error.code
        if code in (408, 409, 425, 429) or code >= 500:
            raise Again(str(code), _seconds(error.headers.get("Retry-After")))
        try:
            said = self._clean(_read(error, time.monotonic() + 5.0))
        except (OSError, http.client.HTTPException, Again):
            said = ""
        sentence = f"{self._url} answers {code}{_complaint(said)}."
        if code in (400, 413, 422):
            raise NoReply(str(code), sentence)
        if code in (401, 403):
            sentence += " The key is taken from the environment variable that llm.variable names."
        elif code == 404:
            sentence += " Look at llm.url and llm.model."
        raise Refused(sentence)

    def _answer(self, said: str) -> Reply:
        """The reply in the endpoint's JSON, or Again."""
        try:
            data = json.loads(said)
            choice = data["choices"][0]
            text = choice["message"]["content"]
            counts = data.get("usage") or {}
            usage = int(counts.get("prompt_tokens") or 0), int(counts.get("completion_tokens") or 0)
            finish, model = str(choice.get("finish_reason") or "stop"), str(data.get("model") or self.model)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise Again("garbage") from None
        if text is not None and not isinstance(text, str):
            raise Again("garbage", usage=usage)
        text = _encodable(text or "").strip()
        if not text and finish not in UNUSABLE:
            raise Again("empty answer", usage=usage)
        return Reply(text, _encodable(finish), *usage, model=_encodable(model))

    def _clean(self, data: bytes) -> str:
        """Text without the key: an endpoint may send back what it was sent."""
        text = data.decode("utf-8", "replace")
        return text.replace(self._key, HIDDEN) if self._key and len(self._key) >= SHORTEST_KEY else text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


def _checked(url: str, key: str | None, variable: str | None) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"llm.url takes an address such as https://api.openai.com/v1, not '{redact_text(url)}'.")
    if parts.username or parts.password or parts.query:
        raise ConfigError("llm.url holds a user, a password or a query; a key belongs into the environment.")
    if variable is not None and key is None and not _is_loopback(parts.hostname):
        raise ConfigError(f"{variable} is not set; set it, or give llm.variable=null.")
    if key and parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise ConfigError(
            f"The key in {variable} would travel unencrypted to {parts.hostname}: take https, or llm.variable=null."
        )
    if key and not (key.isascii() and key.isprintable()):
        raise ConfigError(f"The key in {variable} holds characters that no header takes.")
    return url.rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _encodable(text: str) -> str:
    """Text without halves of characters: JSON can hold one, of an emoji that was cut, and no file can."""
    return text.encode("utf-8", "replace").decode()


def _read(response: Any, deadline: float) -> bytes:
    """The body; a socket's time-out alone would let one byte a minute go on for ever."""
    data = b""
    while piece := response.read1(1 << 16):
        data += piece
        if len(data) > LONGEST_BODY:
            raise Again("garbage")
        if time.monotonic() > deadline:
            raise Again("timeout")
    return data


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After as seconds from now: a number or a date; None for anything else."""
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


def _complaint(said: str) -> str:
    """What an endpoint says is wrong, in the protocol's form or as it is, on one line."""
    try:
        data = json.loads(said)
        fault = data.get("error", data.get("detail", said)) if isinstance(data, dict) else said
        said = str(fault.get("message", fault)) if isinstance(fault, dict) else str(fault)
    except ValueError:
        pass
    line = redact_text(" ".join(said.split()))[:200].rstrip(".")
    return f": {line}" if line else ""
