"""Stored replies, requested once by all threads and processes; many requests, and an endpoint that is down."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmlab.config.errors import ConfigError, RunError
from mmlab.curate.client import PATIENCE, Client, NoReply, Reply
from mmlab.curate.config import EndpointConfig, LLMConfig, LocalModelConfig
from mmlab.curate.endpoint import Endpoint
from mmlab.curate.local_model import LocalModel
from tests.curate.scripted_endpoint import ScriptedEndpoint, always, user
from tests.model import tiny


class Echo:
    """A backend that records its dialogues."""

    def __init__(self, model="echo", **settings):
        self.model, self.settings, self.asked = model, settings, []

    def complete(self, messages, stop):
        self.asked.append(messages)
        return Reply(messages[-1]["content"].upper())


def client(backend, folder, workers=1) -> Client:
    return Client(LLMConfig(workers=workers), backend, folder)


def endpoint(server: ScriptedEndpoint, **changes) -> Endpoint:
    return Endpoint(EndpointConfig(url=server.url, model="m", backoff=0.01, settings={}, **changes))


def test_a_stored_reply_is_not_requested_again(tmp_path):
    first, second = Echo(), Echo()
    reply = client(first, tmp_path)(user("hi"))
    assert client(second, tmp_path)(user("hi")) == reply and reply.text == "HI"
    assert len(first.asked) == 1 and not second.asked
    (file,) = tmp_path.glob("*/*.json")
    kept = json.loads(file.read_text())
    assert kept["messages"] == user("hi") and file.stem == reply.hash


@pytest.mark.parametrize(
    ("backend", "words"), [(Echo("other"), "hi"), (Echo(temperature=1.0), "hi"), (Echo(), "hi there")]
)
def test_another_question_is_requested(tmp_path, backend, words):
    client(Echo(), tmp_path)(user("hi"))
    client(backend, tmp_path)(user(words))
    assert len(backend.asked) == 1


@pytest.mark.parametrize("damage", ["", "{", '{"reply": {}}', "[]", '{"model": "x", "reply": {"text": "wrong"}}'])
def test_a_damaged_reply_is_requested_again(tmp_path, damage):
    client(Echo(), tmp_path)(user("hi"))
    (file,) = tmp_path.glob("*/*.json")
    file.write_text(damage)
    assert client(Echo(), tmp_path)(user("hi")).text == "HI"
    assert json.loads(file.read_text())["reply"]["text"] == "HI"


def test_threads_share_one_request(tmp_path):
    gate = threading.Event()

    class Slow(Echo):
        def complete(self, messages, stop):
            gate.wait(60)
            return super().complete(messages, stop)

    slow = Slow()
    shared = client(slow, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        replies = [pool.submit(shared, user("hi")) for _ in range(4)]
        gate.set()
    assert {reply.result().text for reply in replies} == {"HI"} and len(slow.asked) == 1


@pytest.mark.parametrize(
    ("acts", "reason", "says", "usage"),
    [
        (["cut"], "finish_reason length", "was cut off at the token limit", (2, 2)),
        (["cut short"], "finish_reason length", "was cut off at the token limit", (2, 0)),
        (["500", "filtered"], "finish_reason content_filter", "was withheld by a content filter", (2, 0)),
        (["500", "empty"], "empty answer", "was empty in every attempt", (4, 0)),
    ],
)
def test_an_unusable_reply_is_named_and_billed_once(tmp_path, monkeypatch, acts, reason, says, usage):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ScriptedEndpoint(always(*acts)) as server:
        shared = client(endpoint(server, attempts=3), tmp_path)
        for _ in range(2):
            with pytest.raises(NoReply, match=says) as caught:
                shared(user("hi", "there"))
        fault = caught.value
        assert fault.reason == reason and fault.stored and not fault.down and fault.spent is not None
        assert (fault.spent.prompt_tokens, fault.spent.completion_tokens) == usage
        (file,) = tmp_path.glob("*/*.json")
        assert file.stem == fault.spent.hash
        assert len(server.asked) == {"empty": 3, "filtered": 2}.get(acts[-1], 1)
        assert "Authorization" not in server.headers[0]


def test_replies_billed_before_a_failure_are_reported(tmp_path):
    with ScriptedEndpoint(always("empty", "500")) as server:
        shared = client(endpoint(server, variable=None, attempts=3), tmp_path)
        with pytest.raises(NoReply) as caught:
            shared(user("hi", "there"))
    fault = caught.value
    assert fault.reason == "500" and not fault.stored and not fault.down and not list(tmp_path.iterdir())
    assert fault.spent is not None and fault.spent.prompt_tokens == 2 and len(fault.spent.hash) == 64


def test_half_an_emoji_is_stored(tmp_path):
    """JSON can encode one and UTF-8 cannot: unless it is replaced, the reply is billed again and again."""
    with ScriptedEndpoint(answer=lambda prompt: "a smile \ud83d") as server:
        for _ in range(2):
            reply = client(endpoint(server, variable=None), tmp_path)(user("hi"))
            assert reply.text == "a smile ?"
        assert len(server.asked) == 1


def test_the_key_is_in_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_FOR_TESTS", "sk-very-secret")
    with ScriptedEndpoint(answer=lambda prompt: "said sk-very-secret") as server:
        client(endpoint(server, variable="LLM_FOR_TESTS"), tmp_path)(user("hi"))
    (file,) = tmp_path.glob("*/*.json")
    assert "sk-very" not in file.read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_folder):
    language = tiny.language(tokenizer_folder)
    language.save(path := tmp_path_factory.mktemp("local"))
    return path


def test_a_local_model_in_place_of_an_endpoint(folder, tmp_path):
    local = LocalModel(LocalModelConfig(source=str(folder), template="v1", max_tokens=6))
    talk = [{"role": "system", "content": "Be brief."}, *user("what color?")]
    try:
        reply = client(local, tmp_path)(talk)
    except NoReply as error:
        assert error.reason == "finish_reason length"
        (file,) = tmp_path.glob("*/*.json")
        reply = Reply(**json.loads(file.read_text())["reply"])
    assert reply.text and reply.completion_tokens <= 6 and reply.prompt_tokens > 10
    with pytest.raises(ConfigError, match="not 'tool'"):
        local.complete([{"role": "tool", "content": "x"}])


def test_a_local_model_with_new_weights_is_another_model(folder):
    config = LocalModelConfig(source=str(folder), template="v1")
    before = LocalModel(config).settings
    assert before == LocalModel(config).settings
    (file,) = folder.glob("*.safetensors")
    file.touch()
    assert before != LocalModel(config).settings


def outcomes(request, workers: int) -> list[tuple[int, bool]]:
    """Row number and whether it has a reply, of 20 rows, in the order of arrival."""

    class Scripted(Client):
        def __call__(self, messages, stop=None):
            return request(int(messages[0]["content"]))

    rows = [{"key": f"r{i}", "number": i} for i in range(20)]
    asking = Scripted(LLMConfig(workers=workers), Echo(), Path())
    replies = asking.replies(rows, lambda row: user(str(row["number"])))
    return [(row["number"], isinstance(reply, Reply)) for row, reply in replies]


def test_slow_failures_at_the_end_do_not_mean_that_the_endpoint_is_down():
    """Six requests fail one after the other when all others have succeeded."""
    gate, good = threading.Event(), 0

    def request(number):
        nonlocal good
        if number < 6:
            assert gate.wait(60)
            raise NoReply("timeout", "no answer.", down=True)
        good += 1
        if good == 14:
            gate.set()
        return Reply("yes")

    assert sorted(outcomes(request, 7)) == [(i, i >= 6) for i in range(20)]


@pytest.mark.parametrize("workers", [1, 4])
def test_an_endpoint_that_goes_down_ends_the_requests(workers):
    asked = []

    def request(number):
        asked.append(number)
        if len(asked) < 4:
            return Reply("yes")
        raise NoReply("500", "no answer.", down=True)

    with pytest.raises(RunError, match=r"5 requests in a row failed, the last for r\d+: no answer"):
        outcomes(request, workers)
    assert len(asked) <= 3 + PATIENCE + 3 * workers


def test_occasional_failures_do_not_mean_that_the_endpoint_is_down():
    """Only failures in a row count, however many there were before."""

    def request(number):
        if number % 2:
            raise NoReply("timeout", "no answer.", down=True)
        return Reply("yes")

    replied = [reply for _, reply in outcomes(request, 1)]
    assert len(replied) == 20 and replied.count(False) == 10 > PATIENCE


def test_stored_replies_that_are_cut_off_do_not_count_as_failures():
    def request(number):
        raise NoReply("finish_reason length", "cut.", spent=Reply("half", "length"), stored=True)

    assert len(outcomes(request, 2)) == 20
