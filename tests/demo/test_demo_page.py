"""The demo in a browser: a chat about pictures with two runs, and a form that draws with two."""

import json
import time
import urllib.request

import pytest

from tests.curate.chromium import CHROMIUM, Chromium, Tab
from tests.demo.tiny_demo import MARKUP, served
from tests.tiny_files import png

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

SAID = "[...document.querySelectorAll('[data-testid={}]')].map(e => e.innerText)"
PROMPTS = "[...document.querySelectorAll('.sent textarea')].map(e => e.value)"
PICTURES = "[...document.querySelectorAll('.pictures img')].filter(e => e.naturalWidth === 8)"
BUTTON = "[...document.querySelectorAll('button')].find(e => e.innerText === '{}')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("browser") / "profile") as running:
        yield running


@pytest.fixture(scope="module")
def chat(chats):
    with served(chats, "run=before", "compare=after", "max_new_tokens=1000") as address:
        yield address


@pytest.fixture(scope="module")
def form(draws):
    with served(draws, "run=class", "compare=class") as address:
        yield address


def opened(browser: Chromium, url: str) -> Tab:
    """The page, with what it reports: errors, dialogs, and requests that its policy refuses."""
    tab = browser.tab("about:blank")
    watch = "addEventListener('{}', event => (window.faults ??= []).push('{}'))"
    script = ";".join(watch.format(name, name) for name in ("error", "unhandledrejection", "securitypolicyviolation"))
    tab.call("Page.addScriptToEvaluateOnNewDocument", source=f"{script}; window.alert = () => faults.push('alert')")
    tab.go(url)
    tab.wait(f"!!({BUTTON.format('Stop')})")
    return tab


def faultless(tab: Tab, url: str) -> None:
    assert tab.js("window.faults ?? []") == []
    places = tab.js("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(places) > 10 and all(place.startswith((url, "data:", "blob:")) for place in places)


def upload(tab: Tab, *files) -> None:
    document = tab.call("DOM.getDocument", depth=-1)["root"]["nodeId"]
    node = tab.call("DOM.querySelector", nodeId=document, selector="input[type=file]")["nodeId"]
    tab.call("DOM.setFileInputFiles", nodeId=node, files=list(map(str, files)))
    tab.wait(f"document.querySelectorAll('.thumbnail-item').length === {len(files)}")


def send(tab: Tab, text: str) -> None:
    tab.js("document.querySelector('.asked textarea').focus()")
    tab.write(text)
    tab.wait(f"document.querySelector('.asked textarea').value === {json.dumps(text)}")
    tab.press("Enter")


def click(tab: Tab, name: str) -> None:
    tab.js(f"({BUTTON.format(name)}).click()")


def longest(tab: Tab, tokens: int) -> None:
    """Set the slider of new tokens."""
    field = "document.querySelector('.longest input[type=number]')"
    tab.wait(f"!!{field}")
    tab.js(f"{field}.focus(); {field}.select()")
    tab.write(str(tokens))
    tab.press("Enter")


def settled(tab: Tab, expression: str) -> str:
    """The value of an expression once it stays the same."""
    value, until = tab.js(expression), time.monotonic() + 60
    while True:
        time.sleep(0.4)
        if (now := tab.js(expression)) == value:
            return value
        assert time.monotonic() < until
        value = now


def test_a_question_with_a_picture_is_answered_by_both(browser, chat, tmp_path):
    url, folder = chat
    tab = opened(browser, url)
    longest(tab, 8)
    (tmp_path / "<b>a.png").write_bytes(png(64, 48))
    upload(tab, tmp_path / "<b>a.png")
    send(tab, MARKUP)
    tab.wait(f"{SAID.format('bot')}.filter(text => text).length === 2")
    answers = settled(tab, SAID.format("bot"))
    assert answers[0] != answers[1]
    assert tab.js(SAID.format("user")).count(MARKUP) == 2
    tab.wait("[...document.querySelectorAll('[data-testid=user] img')].filter(e => e.naturalWidth === 64).length === 2")
    tab.js("[...document.querySelectorAll('button')].find(e => e.innerText.startsWith('The prompt as sent')).click()")
    tab.wait(f"{PROMPTS}.length === 2")
    prompts = tab.js(PROMPTS)
    assert len(prompts) == 2 and all(MARKUP in prompt and "tokens of a picture]" in prompt for prompt in prompts)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 1 and files[0].suffix == ".png", "the upload is gone, and its picture on the page is left"
    send(tab, "again?")
    tab.wait(f"{SAID.format('bot')}.filter(text => text).length === 4")
    assert "again?" in settled(tab, PROMPTS)[1]
    click(tab, "Clear")
    tab.wait(f"{SAID.format('bot')}.length === 0")
    assert not files[0].exists()
    faultless(tab, url)


def test_a_stream_is_stopped_and_answered_again(browser, chat):
    url, _ = chat
    tab = opened(browser, url)
    send(tab, "what?")
    tab.wait(f"{SAID.format('bot')}.some(text => text.length > 20)")
    click(tab, "Stop")
    stopped = settled(tab, SAID.format("bot"))
    assert len(stopped) == 2
    longest(tab, 3)
    click(tab, "Regenerate")
    tab.wait(f"{SAID.format('bot')}.every((text, n) => text.length < {json.dumps(list(map(len, stopped)))}[n])")
    again = settled(tab, SAID.format("bot"))
    assert all(before.startswith(after.rstrip()) for before, after in zip(stopped, again, strict=True))


def test_a_broken_upload_is_one_sentence(browser, chat, tmp_path):
    url, folder = chat
    before = set(folder.rglob("*.png"))
    tab = opened(browser, url)
    (tmp_path / "<img src=x onerror=alert(1)>.png").write_bytes(b"no picture")
    upload(tab, tmp_path / "<img src=x onerror=alert(1)>.png")
    send(tab, "what?")
    tab.wait("document.body.innerText.includes('neither JPEG nor PNG nor WebP')")
    assert "cannot be read as an image" in tab.js("document.body.innerText")
    assert tab.js("document.querySelector('.asked textarea').value") == "what?"
    assert set(folder.rglob("*.png")) == before
    assert "alert" not in tab.js("window.faults ?? []")


def test_a_file_that_was_not_uploaded_is_not_read(chat, tmp_path):
    url, _ = chat
    (tmp_path / "secret.png").write_bytes(png())
    file = {"path": str(tmp_path / "secret.png"), "meta": {"_type": "gradio.FileData"}}
    page = json.load(urllib.request.urlopen(f"{url}config"))
    sending = next(event["id"] for event in page["dependencies"] if len(event["inputs"]) == 3)
    event = {"data": [{"text": "what?", "files": [file]}, 0, 1], "fn_index": sending, "session_hash": "stranger"}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}gradio_api/queue/join", json.dumps(event).encode(), headers)
    urllib.request.urlopen(request).close()
    with urllib.request.urlopen(f"{url}gradio_api/queue/data?session_hash=stranger") as stream:
        done = next(line for line in stream if b"process_completed" in line)
    assert not json.loads(done[5:])["success"] and (tmp_path / "secret.png").exists()


def test_a_grid_is_drawn_by_both(browser, form):
    url, folder = form
    tab = opened(browser, url)
    click(tab, "Draw")
    tab.wait(f"{PICTURES}.length === 16")
    tab.wait("[...document.querySelectorAll('.strip img')].filter(e => e.naturalWidth > 300).length === 2")
    text = tab.js("document.body.innerText")
    assert text.count(f"seed 1: {MARKUP}") == 2 and "seed 7: " in text
    assert len(list(folder.rglob("0000.png"))) == 2
    faultless(tab, url)
    tab.go("about:blank")
    until = time.monotonic() + 30
    while list(folder.rglob("0000.png")):
        assert time.monotonic() < until, "pictures are deleted when the page is closed"
        time.sleep(0.1)


def test_a_drawing_whose_visitor_leaves_ends(browser, form):
    """One drawing is made at a time: the second one begins when the first, of a minute, has ended."""
    url, _ = form
    for steps, seen in (("1000", "document.body.innerText.includes('/4k steps')"), ("1", f"{PICTURES}.length === 128")):
        tab = opened(browser, url)
        for field, value in ((".steps input", steps), ("input[aria-label*='Images']", "64")):
            tab.js(f"(n => {{ n.focus(); n.select() }})(document.querySelector({json.dumps(field)}))")
            tab.write(value)
            tab.press("Enter")
        click(tab, "Draw")
        tab.wait(seen, 20)
        tab.go("about:blank")
