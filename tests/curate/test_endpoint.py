"""Faults of an endpoint, which are retried or reported at once; its key; its rate limit."""

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from types import SimpleNamespace
from urllib.parse import quote

import pytest

from mmlab.config.errors import ConfigError
from mmlab.curate import pace as pace_module
from mmlab.curate.client import NoReply, Refused
from mmlab.curate.config import EndpointConfig
from mmlab.curate.endpoint import Endpoint, _seconds
from mmlab.curate.pace import Pace
from tests.curate.scripted_endpoint import DRIPS, ScriptedEndpoint, always, user

KEY = "sk-very-secret-1234"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("LLM_FOR_TESTS", KEY)


def endpoint(server: ScriptedEndpoint | str, **changes) -> Endpoint:
    url = server if isinstance(server, str) else server.url
    few = {"variable": "LLM_FOR_TESTS", "timeout": 10.0, "backoff": 0.01, "attempts": 4, "settings": {}, **changes}
    return Endpoint(EndpointConfig(url=url, model="gpt-tiny", **few))


def test_a_question_and_its_answer():
    with ScriptedEndpoint() as server:
        reply = endpoint(server, settings={"temperature": 0.0, "max_tokens": 9}).complete(user("a", "red star"))
    assert (reply.text, reply.finish, reply.model) == ("repaired: red star", "stop", "gpt-tiny-0613")
    assert (reply.prompt_tokens, reply.completion_tokens, reply.retries) == (3, 3, {})
    (body,) = server.bodies
    assert body.pop("path") == "/v1/chat/completions"
    assert body == {"model": "gpt-tiny", "messages": user("a", "red star"), "temperature": 0.0, "max_tokens": 9}
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("429", "429"),
        ("500", "500"),
        ("503", "503"),
        ("garbage", "garbage"),
        ("other json", "garbage"),
        ("empty", "empty answer"),
        ("hang", "timeout"),
        ("drip", "timeout"),
        ("drop", "garbage"),
    ],
)
def test_transient_faults_are_retried(act, reason):
    times, options = (1, {"timeout": 1.0}) if reason == "timeout" else (2, {})
    with ScriptedEndpoint(always(*[act] * times, "ok")) as server:
        reply = endpoint(server, **options).complete(user("hi"))
        assert reply.text == "repaired: hi" and reply.retries == {reason: times}
        assert len(server.asked) == times + 1


def test_discarded_replies_count_as_billed():
    with ScriptedEndpoint(always("empty", "ok")) as server:
        assert endpoint(server).complete(user("hi")).prompt_tokens == 2


@pytest.mark.parametrize("act", ["429", "500", "hang", "garbage"])
def test_lasting_faults_are_named(act):
    with ScriptedEndpoint(always(act)) as server:
        with pytest.raises(NoReply, match=r"in 2 attempts: .* \(2x\)\.") as caught:
            endpoint(server, attempts=2, timeout=0.2 if act == "hang" else 10.0).complete(user("hi"))
        server.wait_for(2)
    assert caught.value.reason == {"hang": "timeout"}.get(act, act) and caught.value.down
    assert caught.value.spent is None and len(server.asked) == 2


def test_a_last_empty_reply_is_a_reply():
    with ScriptedEndpoint(always("500", "empty")) as server:
        reply = endpoint(server).complete(user("hi", "there"))
    assert (reply.text, reply.finish, reply.retries) == ("", "empty", {"500": 1, "empty answer": 3})
    assert (reply.prompt_tokens, reply.completion_tokens, len(server.asked)) == (6, 0, 4)


def test_no_server():
    with ScriptedEndpoint() as server:
        pass
    with pytest.raises(NoReply, match="no connection") as caught:
        endpoint(server, attempts=2).complete(user("hi"))
    assert caught.value.down


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [
        ("400", NoReply, "returned 400: scripted 400 here."),
        ("401", Refused, "environment variable that llm.variable names"),
        ("404", Refused, "Check llm.url and llm.model."),
        ("302", Refused, "returned 302"),
    ],
)
def test_permanent_faults_are_not_retried(status, kind, says):
    away = {"Location": "http://127.0.0.1:9/"}
    with ScriptedEndpoint(always(status), away) as server, pytest.raises(kind) as caught:
        endpoint(server).complete(user("hi"))
    assert says in str(caught.value) and len(server.asked) == 1
    assert not (isinstance(caught.value, NoReply) and caught.value.down)


def test_an_echoed_key_is_hidden():
    with ScriptedEndpoint(answer=lambda prompt: f"your key is {KEY}") as server:
        assert endpoint(server).complete(user("hi")).text == "your key is <redacted>"


def test_a_placeholder_key_is_not_hidden(monkeypatch):
    monkeypatch.setenv("LLM_FOR_TESTS", "test")
    with ScriptedEndpoint(answer=lambda prompt: "a test tube") as server:
        assert endpoint(server).complete(user("hi")).text == "a test tube"
        assert server.headers[0]["Authorization"] == "Bearer test"


def test_no_other_environment_variable_is_sent(monkeypatch):
    names = ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID")
    for name in names:
        monkeypatch.setenv(name, "private")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Token: private")
    with ScriptedEndpoint() as server:
        endpoint(server).complete(user("hi"))
        endpoint(server, variable=None).complete(user("hi"))
    assert len(server.headers) == 2 and "private" not in str(server.headers)
    assert "Authorization" not in server.headers[1]


def test_requests_to_this_machine_bypass_proxies(monkeypatch):
    with ScriptedEndpoint() as server, ScriptedEndpoint() as proxy:
        for name in ("no_proxy", "NO_PROXY", "REQUEST_METHOD"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        assert endpoint(server).complete(user("hi")).text == "repaired: hi"
        assert len(server.asked) == 1 and proxy.asked == []


def test_a_canceled_request_is_not_retried():
    stop = threading.Event()
    with ScriptedEndpoint(always("503"), {"Retry-After": "30"}) as server, ThreadPoolExecutor(1) as pool:
        waits = pool.submit(endpoint(server, backoff=30.0).complete, user("hi"), stop)
        server.wait_for(1)
        start = time.monotonic()
        stop.set()
        with pytest.raises(NoReply, match="was canceled"):
            waits.result(60)
    assert time.monotonic() - start < 10 and len(server.asked) == 1


def test_retry_after():
    with ScriptedEndpoint(always("429", "ok"), {"Retry-After": "0.5"}) as server:
        asked = endpoint(server)
        asked.complete(user("hi"))
        assert server.times[1] - server.times[0] >= 0.5
    assert _seconds("7") == 7 and _seconds("-3") == 0
    assert 50 < (_seconds(formatdate(time.time() + 60, usegmt=True)) or 0) <= 60
    assert [_seconds(text) for text in (None, "", "soon", "nan", "inf")] == [None] * 5


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("api.openai.com/v1", "must be an address such as https://api.openai.com/v1, not 'api.openai.com/v1'"),
        ("http://gpu-box:8000/v1", "would be sent unencrypted to gpu-box; use https or llm.variable=null"),
        ("https://me:word@host/v1", "put the key into the environment"),
    ],
)
def test_invalid_addresses(url, says):
    with pytest.raises(ConfigError, match=says):
        endpoint(url)
    endpoint("http://gpu-box:8000/v1", variable=None)
    endpoint("http://[::1]:8000/v1")


@pytest.mark.parametrize("value", [None, "", " "])
def test_a_missing_key(monkeypatch, value):
    monkeypatch.delenv("LLM_FOR_TESTS") if value is None else monkeypatch.setenv("LLM_FOR_TESTS", value)
    with pytest.raises(ConfigError, match=r"^LLM_FOR_TESTS is not set; set it, or use llm\.variable=null\.$"):
        endpoint("https://api.openai.com/v1")
    endpoint("http://localhost:8000/v1")


def test_reserved_settings_are_refused():
    with pytest.raises(ConfigError, match="cannot contain 'stream'"):
        endpoint("http://localhost/v1", settings={"stream": True})


class Clock:
    """A clock, and an event that ends a wait.

    Attributes:
        now: seconds.
        meanwhile: called once, in the middle of the next wait.
        stops_at: when the event is set.
    """

    def __init__(self, stops_at: float = 1e9):
        self.now, self.meanwhile, self.stops_at = 100.0, None, stops_at

    def monotonic(self) -> float:
        return self.now

    def is_set(self) -> bool:
        return self.now >= self.stops_at

    def wait(self, seconds: float) -> None:
        if (meanwhile := self.meanwhile) is not None:
            self.meanwhile = None
            self.now += seconds / 2
            meanwhile()
            seconds /= 2
        self.now = min(self.now + seconds, max(self.now, self.stops_at))


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(pace_module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def starts(pace: Pace, clock: Clock, count: int) -> list[float]:
    times = []
    for _ in range(count):
        pace.wait(clock)  # type: ignore[arg-type]
        times.append(round(clock.now - 100, 6))
    return times


def test_requests_are_spaced(clock):
    assert starts(Pace(600), clock, 4) == [0, 0.1, 0.2, 0.3]
    assert starts(Pace(), clock, 3) == [0.3, 0.3, 0.3]


def test_a_pause_delays_later_requests(clock):
    pace = Pace(60)
    pace.hold(5)
    pace.hold(2)
    assert starts(pace, clock, 3) == [5, 6, 7]


def test_a_pause_delays_waiting_requests(clock):
    pace = Pace(60)
    assert starts(pace, clock, 1) == [0]
    clock.meanwhile = lambda: pace.hold(10)
    assert starts(pace, clock, 2) == [10.5, 11.5], "still spaced"
    clock.meanwhile = lambda: pace.hold(0.1)
    assert starts(pace, clock, 1) == [12.5], "a slot after the pause stays"


def test_stop_ends_a_wait(clock):
    pace = Pace(1)
    assert starts(pace, clock, 1) == [0]
    clock.stops_at = 103.0
    assert starts(pace, clock, 1) == [3]


@pytest.mark.parametrize("act", sorted(DRIPS))
def test_a_call_ends_at_its_deadline_whatever_drips(act):
    start, threads = time.monotonic(), threading.active_count()
    with ScriptedEndpoint(always(act)) as server:
        with pytest.raises(NoReply, match=r"timeout|returned 400"):
            endpoint(server, attempts=1, timeout=0.5).complete(user("hi"))
        assert time.monotonic() - start < 10
        end = time.monotonic() + 60
        while any("run" in thread.name for thread in threading.enumerate()) and time.monotonic() < end:
            time.sleep(0.01)
        assert time.monotonic() < end, f"{threading.active_count()} threads, {threads} before"


def test_a_handshake_that_drips_ends_at_the_deadline(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            connection, _ = listening.accept()
            with contextlib.suppress(OSError):
                connection.sendall(b"\x16\x03\x03\x40\x00")  # a record of 16 kB
                while True:
                    time.sleep(0.05)
                    connection.sendall(b"\x00")

        threading.Thread(target=drip, daemon=True).start()
        start = time.monotonic()
        url = f"https://127.0.0.1:{listening.getsockname()[1]}/v1"
        with pytest.raises(NoReply, match="timeout"):
            Endpoint(EndpointConfig(url=url, model="m", attempts=1, timeout=0.5, variable=None)).complete(user("hi"))
        assert time.monotonic() - start < 10


@pytest.mark.parametrize("spell", [json.dumps, quote, lambda key: "".join(f"\\u{ord(c):04X}" for c in key)])
def test_an_echoed_key_is_hidden_in_any_spelling(spell, monkeypatch):
    key = 'sk-slash/and"quote%0123456789'
    monkeypatch.setenv("LLM_FOR_TESTS", key)
    with ScriptedEndpoint(answer=lambda prompt: f"your key is {spell(key)}") as server:
        text = endpoint(server).complete(user("hi")).text
    assert "<redacted>" in text and "0123456789" not in text and "\\u0073" not in text
