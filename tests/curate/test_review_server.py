"""The review's server: which requests it accepts, and its responses."""

import http.client
import json
import os
import signal
import stat
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmlab.config.errors import ConfigError, RunError
from mmlab.curate import journal
from mmlab.curate.decisions import Review
from mmlab.curate.minigpt4_pipeline import reviewed_images
from mmlab.curate.review_server import ReviewServer, serve, token_of
from tests.curate.tiny_curation import colour, decide, waiting

TEXTS = [("a dog and", "A dog <script>alert(1)</script>."), ("a cat.", "a cat."), ("", "“ü”.")]


def decision(i=0, action="accept", **changes):
    """A decision about the undecided description in place `i`."""
    key, (_, proposed) = f"s{i % 3:04d}", TEXTS[i % 3]
    return {"i": i, "action": action, "text": "", "key": key, "proposed": proposed, "seen": 0, **changes}


@pytest.fixture
def server(tmp_path):
    out = waiting(tmp_path, TEXTS)
    with ReviewServer(Review(out), reviewed_images(out), token_of(out)) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield running
        running.shutdown()


def ask(server, path, said=None, method=None, **headers):
    """Status, headers and body of a response; _ stands for - in the names of headers."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    sent = {"Content-Type": "application/json"} if said is not None else {}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    body = said if isinstance(said, bytes | None) else json.dumps(said).encode()
    connection.request(method or ("GET" if said is None else "POST"), path, body, sent)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, answer.headers, data


def test_page_item_image_and_state(server):
    at = f"/{server.token}/"
    status, headers, page = ask(server, at)
    assert status == 200 and b"<title>Review</title>" in page and b"http" not in page.split(b"<style>")[1]
    assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["Referrer-Policy"] == "no-referrer"
    item = json.loads(ask(server, at + "item/0")[2])
    assert item["text"] == TEXTS[0][1] and item["described"] == "a dog and" and item["seen"] == 0
    assert ask(server, at + "picture/1")[2] == colour(1)
    assert json.loads(ask(server, at + "state")[2])["letters"] == "---"


def test_it_only_listens_on_loopback(server):
    assert server.server_address[0] == "127.0.0.1" and server.url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize("path", ["/", "/state", "//state", "/{0}", "/{1}/state", "/{2}/state", "/{0}x/state"])
def test_nothing_without_the_token(server, path):
    token = server.token
    path = path.format(token, token[:-1], token.swapcase())
    status, _, data = ask(server, path)
    assert status == 403 and token.encode() not in data and b"picture" not in data


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example:80"},
        {"Host": "localhost"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_pages_of_other_sites_change_and_read_nothing(server, headers):
    assert ask(server, f"/{server.token}/decide", decision(), **headers)[0] == 403
    assert ask(server, f"/{server.token}/state", **headers)[0] == 403
    assert server.review.state()["left"] == 3


def test_a_form_of_another_site_is_refused(server):
    said = json.dumps(decision()).encode()
    assert ask(server, f"/{server.token}/decide", said, Content_Type="text/plain")[0] == 400
    assert server.review.state()["left"] == 3


def test_decisions(server):
    at = f"/{server.token}/"
    own = {"Origin": server.origins[0], "Sec_Fetch_Site": "same-origin"}
    status, _, data = ask(server, at + "decide", decision(1, "edit", text="A cat."), **own)
    assert (status, json.loads(data)["state"]["letters"]) == (200, "-e-")
    assert ask(server, at + "decide", decision(1, "reject"), **own)[0] == 409
    assert ask(server, at + "decide", decision(0, key="s0001"))[0] == 409
    assert ask(server, at + "decide", decision(0, proposed="A dog."))[0] == 409
    assert ask(server, at + "undo", {"last": 7})[0] == 409
    status, _, data = ask(server, at + "undo", {"last": 1})
    assert (status, json.loads(data)["i"], server.review.state()["letters"]) == (200, 1, "---")


@pytest.mark.parametrize(
    "said",
    [
        *(b"", b"{", b"[]", b'"accept"', b"\xff", {}, {"i": 0}, {"last": None}),
        *(decision(99), decision(-1), {**decision(), "i": "x"}, decision(action="drop"), decision(seen=None)),
        {name: value for name, value in decision().items() if name != "key"},
        *(decision(action="edit", text=text) for text in (" ", "x" * 30_000)),
    ],
)
def test_invalid_decisions(server, said):
    assert ask(server, f"/{server.token}/decide", said)[0] == 400
    assert server.review.state()["left"] == 3 and ask(server, f"/{server.token}/state")[0] == 200


@pytest.mark.parametrize("path", ["item/3", "item/-1", "item/x", "picture/9", "nothing", "..", "item/0/../../x"])
def test_unknown_paths(server, path):
    assert ask(server, f"/{server.token}/{path}")[0] == 404


def test_a_full_disk_is_reported(server, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal.os, "write", full)
    status, _, data = ask(server, f"/{server.token}/decide", decision())
    monkeypatch.undo()
    assert status == 507 and b"Not saved" in data and server.review.state()["left"] == 3
    assert ask(server, f"/{server.token}/decide", decision())[0] == 200


def test_the_token_is_stored_for_its_owner(tmp_path):
    token = token_of(tmp_path)
    assert token == token_of(tmp_path) and len(token) >= 32
    assert stat.S_IMODE((tmp_path / ".review.token").stat().st_mode) == 0o600
    (tmp_path / ".review.token").write_text("")
    assert len(token_of(tmp_path)) >= 32


def test_one_port_and_one_review_at_a_time(tmp_path, server):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=rf"port {server.server_port} is not available"):
        serve(out, server.server_port)
    lock = journal.claim(out / ".review.lock", "serves the review of")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            serve(out, 0)
        except RunError as error:
            status = 7 if "serves the review of" in str(error) else 1
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    lock.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_prints_counts(tmp_path, number):
    out = waiting(tmp_path, TEXTS)
    decide(Review(out), 0, "accept")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a background job of a script
            sys.stdout = open(writing, "w", buffering=1)  # noqa: SIM115
            serve(out, 0)
            sys.stdout.flush()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading) as said:
        assert said.readline().startswith("3 descriptions to review: ")
        os.kill(child, number)
        assert said.read() == "accepted 1, edited 0, rejected 0, left 2\n"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_another_thread_serves_without_signals(tmp_path, monkeypatch):
    """Only the main thread may set signal handlers."""
    monkeypatch.setattr(ReviewServer, "serve_forever", lambda self: None)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(serve, waiting(tmp_path, TEXTS), 0).result()
