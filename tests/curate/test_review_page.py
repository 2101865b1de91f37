"""The review page in a browser: keys, buttons, two tabs, a server that is killed."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from mmlab.curate.journal import read_rows
from mmlab.curate.review_server import serve, token_of
from mmlab.data.sources.shapes import shapes
from tests.curate.chromium import CHROMIUM, Chromium, Tab
from tests.curate.tiny_curation import catch, waiting

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

TEXTS = [
    ("a red star a red star and", "A red star."),
    ("Two circles <b>big</b>.", "Two circles <b>big</b>."),
    ("a square.", "A square, “blue”."),
    ("a cross.", "A cross."),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("browser") / "profile") as running:
        yield running


class Served:
    """A review in a child process that can be killed and restarted at the same address."""

    def __init__(self, out: Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.out, self.url = out, f"http://127.0.0.1:{self.port}/{token_of(out)}/"
        self.start()

    def start(self) -> None:
        self.child = os.fork()
        if self.child == 0:
            try:
                serve(self.out, self.port)
            finally:
                os._exit(1)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                return socket.create_connection(("127.0.0.1", self.port)).close()
            except ConnectionRefusedError:
                time.sleep(0.02)
        raise AssertionError("the review did not start")

    def kill(self) -> None:
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)

    def log(self) -> list[tuple]:
        rows = read_rows(self.out / "decisions.jsonl")
        return [(row["action"], row.get("key") or row["undoes"], row.get("text")) for row in rows]


@pytest.fixture
def review(tmp_path):
    images = [
        next(bytes(data) for name, data in members.items() if name in ("png", "jpg") and isinstance(data, bytes))
        for _, members in shapes(len(TEXTS), "review", size=96)
    ]
    served = Served(waiting(tmp_path, TEXTS, images))
    yield served
    served.kill()


def opened(browser: Chromium, review: Served) -> Tab:
    tab = browser.tab(review.url)
    tab.wait("!busy && item")
    return tab


def press(tab: Tab, key: str, then: str, ctrl: bool = False) -> None:
    tab.press(key, ctrl)
    tab.wait(f"!busy && ({then})")


def shown(tab: Tab) -> tuple:
    return tab.js("[place, at('text').textContent, at('state').textContent]")


def test_accept_edit_reject_and_undo_by_key(browser, review, tmp_path):
    tab = opened(browser, review)
    assert shown(tab) == [0, "A red star.", "Not decided"]
    tab.wait("at('picture').complete && at('picture').naturalWidth === 96")
    assert tab.js("[...document.querySelectorAll('#diff del')].map(e => e.textContent).join('|')") != ""
    press(tab, "a", "place === 1")
    assert tab.js("document.querySelectorAll('#text b').length") == 0, "a model's text is not markup"
    press(tab, "e", "editing")
    tab.js("at('draft').select()")
    tab.write("Two big circles aerj.")
    assert tab.js("place") == 1, "letters are text during an edit"
    press(tab, "Enter", "place === 2", ctrl=True)
    press(tab, "r", "place === 3")
    assert review.log() == [
        ("accept", "s0000", None),
        ("edit", "s0001", "Two big circles aerj."),
        ("reject", "s0002", None),
    ]
    press(tab, "u", "place === 2")
    assert shown(tab) == [2, "A square, “blue”.", "Not decided"]
    assert tab.js("at('counts').textContent") == "1 accepted1 edited0 rejected2 left"
    press(tab, "a", "place === 3")
    press(tab, "ArrowLeft", "place === 2")
    press(tab, "ArrowLeft", "place === 1")
    assert shown(tab) == [1, "Two big circles aerj.", "Edited"]
    press(tab, "a", "place === 3")
    assert review.log()[-1] == ("edit", "s0001", "Two big circles aerj."), "the edited text stays as it is shown"
    press(tab, "r", "item === null")
    assert "All decided." in tab.js("document.body.innerText")
    tab.screenshot(tmp_path / "done.png")
    assert (tmp_path / "done.png").stat().st_size > 5000


def test_buttons_do_the_same(browser, review):
    tab = opened(browser, review)
    for button, then in (("accept", "place === 1"), ("reject", "place === 2"), ("edit", "editing")):
        tab.click(f"#{button}")
        tab.wait(f"!busy && ({then})")
    tab.click("#cancel")
    tab.wait("!busy && !editing")
    tab.click("#next")
    tab.wait("!busy && place === 3")
    tab.click("#undo")
    tab.wait("!busy && place === 1 && state.rejected === 0")
    assert review.log() == [("accept", "s0000", None), ("reject", "s0001", None), ("undo", 2, None)]


def test_reload_and_a_draft(browser, review):
    tab = opened(browser, review)
    press(tab, "a", "place === 1")
    press(tab, "e", "editing")
    tab.write(" And a line.")
    tab.js("window.old = true")
    tab.call("Page.reload")
    tab.wait("!window.old && document.readyState === 'complete'")
    tab.wait("!busy && editing")
    assert tab.js("[place, state.accepted, at('draft').value]") == [1, 1, "Two circles <b>big</b>. And a line."]
    press(tab, "Escape", "!editing")
    assert shown(tab)[1] == "Two circles <b>big</b>." and len(review.log()) == 1


def test_killed_and_started_again(browser, review):
    tab = opened(browser, review)
    press(tab, "a", "place === 1")
    press(tab, "r", "place === 2")
    review.kill()
    press(tab, "e", "editing")
    tab.js("at('draft').select()")
    tab.write("A blue square.")
    press(tab, "Enter", "!at('notice').hidden", ctrl=True)
    assert "may not be saved" in tab.js("at('notice').textContent") and tab.js("at('draft').value") == "A blue square."
    review.start()
    press(tab, "Enter", "place === 3", ctrl=True)
    assert tab.js("at('notice').hidden")
    press(tab, "u", "place === 2")
    press(tab, "u", "place === 1")
    assert tab.js("state.letters") == "a---"
    assert [row[0] for row in review.log()] == ["accept", "reject", "edit", "undo", "undo"]


def test_a_second_tab_corrupts_nothing(browser, review):
    one, two = opened(browser, review), opened(browser, review)
    press(one, "a", "place === 1")
    press(two, "r", "!at('notice').hidden")
    assert "decided, perhaps in another tab" in two.js("at('notice').textContent")
    assert shown(two) == [0, "A red star.", "Accepted"] and review.log() == [("accept", "s0000", None)]
    press(two, "j", "place === 1")
    press(two, "a", "place === 2")
    press(one, "u", "!at('notice').hidden")
    assert len(review.log()) == 2, "an undo of a decision that this tab has not seen needs a second key press"
    press(one, "u", "state.left === 3")
    assert review.log()[2:] == [("undo", 2, None)] and one.js("state.letters") == "a---"
    press(two, "r", "place === 3")
    one.js("dispatchEvent(new Event('focus'))")
    one.wait("!busy && state.letters === 'a-r-'")


def test_a_tab_outlives_a_curation(browser, review):
    """When rules catch the first description, another one that the person has not seen becomes the first."""
    tab = opened(browser, review)
    first = tab.js("at('picture').src")
    review.kill()
    catch(review.out, "s0000")
    review.start()
    press(tab, "a", "!at('notice').hidden")
    assert "has run again" in tab.js("at('notice').textContent") and review.log() == []
    assert shown(tab) == [0, "Two circles <b>big</b>.", "Not decided"]
    assert tab.js("at('picture').src") != first and tab.js("at('picture').src.endsWith('/picture/0?s0001')")
    press(tab, "e", "editing")
    tab.write(" More.")
    tab.js("dispatchEvent(new Event('focus'))")
    tab.wait("!busy && editing && at('draft').value.endsWith(' More.')")
    review.kill()
    catch(review.out, "s0001")
    review.start()
    tab.js("dispatchEvent(new Event('focus'))")
    tab.wait("!busy && !editing && item.key === 's0002'")
    assert "has run again" in tab.js("at('notice').textContent") and review.log() == []
    press(tab, "r", "place === 1")
    assert review.log() == [("reject", "s0002", None)]


def test_a_draft_belongs_to_one_curation_and_text(browser, review):
    tab = opened(browser, review)
    press(tab, "e", "editing")
    tab.write(" More.")
    elsewhere = "['draft', '/other/', item.key, item.proposed].join(' ')"
    assert tab.js("drafts(item)").endswith(" More.") and tab.js(f"sessionStorage.getItem({elsewhere})") is None
    assert tab.js("drafts({...item, proposed: 'Another text.'})") is None
    assert tab.js("Object.keys(sessionStorage).every(name => name.startsWith('draft ' + location.pathname))")


def test_a_timeout_may_still_save(browser, review):
    tab = opened(browser, review)
    tab.js("const patience = AbortSignal.timeout.bind(AbortSignal); AbortSignal.timeout = () => patience(300); 1")
    os.kill(review.child, signal.SIGSTOP)
    try:
        press(tab, "a", "!at('notice').hidden")
        assert "this may not be saved" in tab.js("at('notice').textContent") and tab.js("place") == 0
    finally:
        os.kill(review.child, signal.SIGCONT)
    tab.js("AbortSignal.timeout = patience; 1")
    press(tab, "a", "place === 1 || at('notice').textContent.includes('Already decided')")
    assert review.log() == [("accept", "s0000", None)], "once"


def test_keys_before_the_next_image_is_shown_decide_nothing(browser, review):
    tab = opened(browser, review)
    tab.js("for (const key of 'aar') dispatchEvent(new KeyboardEvent('keydown', {key}))")
    tab.wait("!busy && place === 1")
    assert review.log() == [("accept", "s0000", None)] and tab.js("at('notice').hidden")
