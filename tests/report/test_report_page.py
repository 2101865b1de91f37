"""`mmlab report` in a browser: curves, samples, sweeps and texts that look like markup."""

import pytest

from mmlab import cli
from tests.curate.chromium import CHROMIUM, Chromium, Tab
from tests.report.tiny_runs import MARKUP, add_scores, make_run, make_sweep

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
SAFE = MARKUP.replace("/", "_")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("browser") / "profile") as running:
        yield running


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def opened(browser: Chromium, page) -> Tab:
    """The page, with what it reports: errors, dialogs, and requests that its policy refuses."""
    tab = browser.tab("about:blank")
    watch = "addEventListener('{}', event => (window.faults ??= []).push('{}'))"
    script = ";".join(watch.format(name, name) for name in ("error", "unhandledrejection", "securitypolicyviolation"))
    tab.call("Page.addScriptToEvaluateOnNewDocument", source=f"{script}; window.alert = () => faults.push('alert')")
    tab.go(page.resolve().as_uri())
    return tab


def drawn(tab: Tab, chart: str) -> None:
    tab.js(f"document.getElementById('{chart}').scrollIntoView({{block: 'center'}})")
    tab.wait(f"!!document.querySelector('#{chart} .nsewdrag, #{chart} .parcoords')")


def hover(tab: Tab, chart: str) -> str:
    """The texts beside the pointer in the middle of a chart."""
    drawn(tab, chart)
    box = f"document.querySelector('#{chart} .nsewdrag').getBoundingClientRect()"
    x, y = tab.js(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})")
    for n in range(2):
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + n, y=y)
    tab.wait(f"!!document.querySelector('#{chart} .hoverlayer text')")
    return tab.js(f"document.querySelector('#{chart} .hoverlayer').textContent")


@needs_browser
def test_curves_samples_and_texts_of_runs(browser, root, capsys):
    named = SAFE.replace("%{x}", "")
    add_scores(make_run(root, SAFE, 90, texts=MARKUP, sheets=4), MARKUP)
    make_run(root, "b", 40, 3e-3, sheets=2)
    assert cli.main(["report", SAFE, "b", "--out", "page.html"]) == 0
    assert capsys.readouterr().out.startswith("page.html (")
    tab = opened(browser, root.parent / "page.html")
    label = hover(tab, "curve-1")
    assert named[:20] in label and "b" in label, "the names of both runs, as they are"
    assert tab.js("document.querySelectorAll('.hoverlayer b, .hoverlayer script').length") == 0
    lines = "document.querySelectorAll('#curve-1 .scatterlayer .trace').length"
    assert tab.js(lines) == 4, "noisy curves lie behind their means"
    tab.click('[data-run="1"]')
    tab.wait(f"{lines} === 2")
    tab.click('[data-log="curve-1"]')
    tab.wait("document.getElementById('curve-1')._fullLayout.yaxis.type === 'log'")

    tab.js("slider.scrollIntoView({block: 'center'}); slider.focus()")
    shown = "[...document.querySelectorAll('[data-film] img')].filter(i => !i.hidden).map(i => i.dataset.step).join()"
    assert tab.js(shown) == "40,20"
    tab.press("ArrowLeft")
    tab.press("ArrowLeft")
    tab.press("ArrowLeft")
    tab.wait("at.value === 'step 10'")
    assert tab.js(shown) == "10,10"
    assert tab.js("document.querySelector('[data-film] img:not([hidden])').naturalWidth") == 64

    texts = tab.js("document.querySelectorAll('details').forEach(d => d.open = true), document.body.innerText")
    assert texts.count(MARKUP) >= 8, "config, command line, data report, file, question, answer, prediction, type"
    assert SAFE in texts and tab.js("document.title").startswith(SAFE)
    assert tab.js("document.querySelectorAll('main b, main script:not([type])').length") == 0
    assert tab.js("window.faults ?? []") == []


@needs_browser
def test_a_sweep_of_fifty_runs(browser, root):
    sweep = make_sweep(root, 50, kind="<b>x</b>&lt;")
    assert cli.main(["report", "rates"]) == 0
    page = sweep / "report.html"
    assert page.stat().st_size < 15e6
    tab = opened(browser, page)
    drawn(tab, "key-2")
    ticks = tab.js("[...document.querySelectorAll('#key-2 .xtick text')].map(t => t.textContent).join(' ')")
    assert ticks == "<b>x</b>&lt; mlp"
    drawn(tab, "parallel")
    assert tab.js("document.getElementById('parallel').textContent").count("<b>x</b>&lt;") == 1
    rows = "[...document.querySelectorAll('#points tbody tr')].map(r => r.cells[4].textContent)"
    assert tab.js(f"{rows}[0]") == "point48" and tab.js(f"{rows}.length") == 50
    tab.js("document.querySelectorAll('#points thead th')[7].click()")
    tab.js("document.querySelectorAll('#points thead th')[7].click()")
    assert tab.js(f"{rows}[0]") == "point0" and tab.js(f"{rows}[49]") == "point49", "empty cells stay last"
    assert tab.js("document.querySelectorAll('#legend input').length") == 49
    assert tab.js("window.faults ?? []") == []


def test_the_index_has_all_runs_with_their_status(root, capsys):
    make_sweep(root, 3)
    failed = make_run(root, SAFE, failed={"error": MARKUP})
    (failed / "done.json").unlink()
    assert cli.main(["report", "b"]) == 2
    assert "There is no run 'b' in runs." in capsys.readouterr().err
    assert cli.main(["report", "rates", "point0"]) == 2
    assert "rates is a sweep, which has a page of its own" in capsys.readouterr().err
    assert cli.main(["report", "point0", "--out", "s3://bucket/page.html"]) == 2
    assert "s3://bucket/page.html is an address; give a local" in capsys.readouterr().err
    assert cli.main(["report", "point0", "--out", "runs/point0/metrics.csv/page.html"]) == 2
    assert "metrics.csv is a file" in capsys.readouterr().err
    (root / "point1" / "data_report.json").write_text("{")
    assert cli.main(["report", "point0"]) == 0
    assert cli.main(["report", "runs/"]) == 0
    page = (root / "index.html").read_text()
    assert page.count('class="status finished"') == 2 and page.count('class="status failed"') == 1
    assert '<a href="point0/report.html">point0</a>' in page and '<a href="point1' not in page
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "plotly" not in page.lower()
    assert "point1/data_report.json cannot be read" in page


def test_missing_packages_are_named(root, monkeypatch, capsys):
    monkeypatch.setattr("mmlab.verbs.report.find_spec", lambda name: None)
    assert cli.main(["report"]) == 2
    assert capsys.readouterr().err == "mmlab: mmlab report needs packages: pip install 'mmlab[report]'.\n"
