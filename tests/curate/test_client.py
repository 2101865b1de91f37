"""Replies that are kept: asked once, whoever asks, whoever dies."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmlab.config.errors import ConfigError
from mmlab.curate.client import Client, NoReply, Reply
from mmlab.curate.endpoint import Endpoint
from mmlab.curate.local_model import LocalModel
from tests.curate.scripted_endpoint import ScriptedEndpoint, always, user
from tests.model import tiny


class Echo:
    """A backend that counts."""

    def __init__(self, model="echo", **settings):
        self.model, self.settings, self.asked = model, settings, []

    def complete(self, messages, stop):
        self.asked.append(messages)
        return Reply(messages[-1]["content"].upper())


def test_a_kept_reply_is_not_asked_for(tmp_path):
    first, second = Echo(), Echo()
    reply = Client(first, tmp_path)(user("hi"))
    assert Client(second, tmp_path)(user("hi")) == reply and reply.text == "HI"
    assert len(first.asked) == 1 and not second.asked
    (file,) = tmp_path.glob("*/*.json")
    kept = json.loads(file.read_text())
    assert kept["messages"] == user("hi") and file.stem == reply.hash


@pytest.mark.parametrize(
    ("backend", "words"), [(Echo("other"), "hi"), (Echo(temperature=1.0), "hi"), (Echo(), "hi there")]
)
def test_another_question_is_asked(tmp_path, backend, words):
    Client(Echo(), tmp_path)(user("hi"))
    Client(backend, tmp_path)(user(words))
    assert len(backend.asked) == 1


@pytest.mark.parametrize("damage", ["", "{", '{"reply": {}}', "[]", '{"model": "x", "reply": {"text": "wrong"}}'])
def test_a_damaged_file_is_asked_for_again(tmp_path, damage):
    Client(Echo(), tmp_path)(user("hi"))
    (file,) = tmp_path.glob("*/*.json")
    file.write_text(damage)
    assert Client(Echo(), tmp_path)(user("hi")).text == "HI"
    assert json.loads(file.read_text())["reply"]["text"] == "HI"


def test_threads_ask_the_same_once(tmp_path):
    gate = threading.Event()

    class Slow(Echo):
        def complete(self, messages, stop):
            gate.wait(60)
            return super().complete(messages, stop)

    slow = Slow()
    client = Client(slow, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        replies = [pool.submit(client, user("hi")) for _ in range(4)]
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
def test_an_answer_that_cannot_be_used_is_named_and_paid_once(tmp_path, monkeypatch, acts, reason, says, usage):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ScriptedEndpoint(always(*acts)) as server:
        client = Client(Endpoint(server.url, "m", attempts=3, backoff=0.01), tmp_path)
        for _ in range(2):
            with pytest.raises(NoReply, match=says) as caught:
                client(user("hi", "there"))
        fault = caught.value
        assert fault.reason == reason and fault.kept and not fault.down and fault.spent is not None
        assert (fault.spent.prompt_tokens, fault.spent.completion_tokens) == usage
        (file,) = tmp_path.glob("*/*.json")
        assert file.stem == fault.spent.hash
        assert len(server.asked) == {"empty": 3, "filtered": 2}.get(acts[-1], 1)
        assert "Authorization" not in server.headers[0]


def test_what_an_endpoint_took_before_it_went_down_is_told(tmp_path):
    with ScriptedEndpoint(always("empty", "500")) as server:
        client = Client(Endpoint(server.url, "m", variable=None, attempts=3, backoff=0.01), tmp_path)
        with pytest.raises(NoReply) as caught:
            client(user("hi", "there"))
    fault = caught.value
    assert fault.reason == "500" and not fault.kept and not fault.down and not list(tmp_path.iterdir())
    assert fault.spent is not None and fault.spent.prompt_tokens == 2 and len(fault.spent.hash) == 64


def test_half_an_emoji_is_kept(tmp_path):
    """JSON can say one; a file in UTF-8 cannot hold it, and the reply would be paid for again and again."""
    with ScriptedEndpoint(answer=lambda prompt: "a smile \ud83d") as server:
        for _ in range(2):
            reply = Client(Endpoint(server.url, "m", variable=None), tmp_path)(user("hi"))
            assert reply.text == "a smile ?"
        assert len(server.asked) == 1


def test_the_key_is_in_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_FOR_TESTS", "sk-very-secret")
    with ScriptedEndpoint(answer=lambda prompt: "said sk-very-secret") as server:
        Client(Endpoint(server.url, "m", variable="LLM_FOR_TESTS"), tmp_path)(user("hi"))
    (file,) = tmp_path.glob("*/*.json")
    assert "sk-very" not in file.read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_folder):
    language = tiny.language(tokenizer_folder)
    language.save(path := tmp_path_factory.mktemp("local"))
    return path


def test_a_local_model_stands_in(folder, tmp_path):
    local = LocalModel(str(folder), template="v1", max_tokens=6)
    talk = [{"role": "system", "content": "Be brief."}, *user("what color?")]
    try:
        reply = Client(local, tmp_path)(talk)
    except NoReply as error:
        assert error.reason == "finish_reason length"
        (file,) = tmp_path.glob("*/*.json")
        reply = Reply(**json.loads(file.read_text())["reply"])
    assert reply.text and reply.completion_tokens <= 6 and reply.prompt_tokens > 10
    with pytest.raises(ConfigError, match="not 'tool'"):
        local.complete([{"role": "tool", "content": "x"}])


def test_a_local_model_that_changes_is_another(folder):
    before = LocalModel(str(folder), template="v1").settings
    assert before == LocalModel(str(folder), template="v1").settings
    (file,) = folder.glob("*.safetensors")
    file.touch()
    assert before != LocalModel(str(folder), template="v1").settings
