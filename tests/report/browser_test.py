"""The pages in headless Chromium: that nothing fails or is fetched, and that all of it can be read."""

import json
import pathlib

import chromium
import pytest
import several_test

from wkd_jax import report

if not chromium.PATH:
    pytest.skip(f"no {', '.join(chromium.NAMES)} on the PATH: install Debian's chromium", allow_module_level=True)

LEGIBLE = (pathlib.Path(__file__).parent / "legible.js").read_text(encoding="utf-8")
WINDOWS = {"desktop": 1280, "phone": 390}
SAID = {
    "classifier": ("digits_kd_of_many_images student", "class number 3 10 ", "optimizer"),
    "detector": ("drawn student", "AP average precision, IoU 0.50 to 0.95 33.26 42.04"),
    "comparison": (
        "Comparison of 12 runs methods",
        "digits_nkd_of_many_images, seed 1 nkd-1 nkd 1 resnet8",
        "unfinished, 3 of 3 epochs",
        "drawn detector fitnet 0 faster_rcnn_r18",
    ),
}


@pytest.fixture(scope="module", name="browser")
def _browser():
    with chromium.opened() as browser:
        yield browser


@pytest.fixture(scope="module", name="pages")
def _pages(tmp_path_factory):
    """The report of a classifier and of a detector, and a page that compares twelve runs with long names."""
    root = tmp_path_factory.mktemp("pages")
    fill, names = several_test.fill, [f"class number {i}" for i in range(10)]
    runs = [
        fill(root / f"{name}-{seed}", name=f"digits_{name}_of_many_images", methods=(name,), seed=seed, names=names)
        for name in ("kd", "wkd_l", "wkd_f", "dist", "nkd")
        for seed in (0, 1)
    ]
    runs.append(fill(root / "unfinished", name="unfinished", finished=False))
    detector = several_test.fill_detection(root / "detector")
    (runs[0] / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in several_test.report_test.records(12))
        + json.dumps({"step": 130, "kind": "train", "total": "nan"})
        + "\n"
    )
    paths = {"classifier": report.write(runs[0]), "detector": report.write(detector)}
    return paths | {"comparison": report.write_comparison([*runs, detector], root / "comparison.html")}


def complaints(browser):
    """What went wrong while the page was opened, and what it asked for besides itself."""
    found = []
    for event in browser.events:
        method, of = event["method"], event["params"]
        if method == "Runtime.exceptionThrown":
            found.append(f"exception: {of['exceptionDetails']['text']}")
        elif method == "Runtime.consoleAPICalled" and of["type"] in ("error", "warning", "assert"):
            found.append(f"console: {of['args'][0].get('value')}")
        elif method == "Log.entryAdded" and of["entry"]["level"] in ("error", "warning"):
            found.append(f"log: {of['entry']['text']}")
        elif method == "Network.requestWillBeSent" and not of["request"]["url"].startswith("data:"):
            found.append(f"request: {of['request']['url']}")
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("page", ["classifier", "detector", "comparison"])
def test_a_page_opens_from_disk_and_can_be_read(browser, pages, page, window, dark):
    browser.show(pages[page], width=WINDOWS[window], dark=dark)
    assert complaints(browser) == [f"request: {pages[page].as_uri()}"]
    assert browser.evaluate(LEGIBLE) == []
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)"
    )
    words = " ".join(browser.evaluate("document.body.innerText").split())
    for expected in SAID[page]:
        assert expected in words
    assert browser.evaluate("document.querySelectorAll('svg.plot text').length") > 20


def test_links_of_a_comparison_lead_to_the_reports(browser, pages):
    browser.show(pages["comparison"], width=1280)
    links = browser.evaluate("[...document.links].map(link => link.href)")
    assert sorted(links) == sorted(pages[key].as_uri() for key in ("classifier", "detector"))


SVG = '<svg viewBox="0 0 300 40" style="width: 300px; display: block">{}</svg>'
BROKEN = {
    "<script>console.error('broken')</script>": "console: broken",
    "<script>throw new Error('broken')</script>": "exception: Uncaught",
    "<img src='http://127.0.0.1:9/x.png'>": "request: http://127.0.0.1:9/x.png",
    "<link rel='stylesheet' href='absent.css'>": "log: Failed to load resource",
    "<div style='width: 2000px'>wide</div>": "page wider than the window: 2008 in 1280",
    "<p style='font-size: 8px'>tiny</p>": "small text: tiny 8.0 px",
    "<p style='color: #999'>faint</p>": "faint text: faint 2.85",
    "<div style='background: #234'><p>dark on dark</p></div>": "faint text: dark on dark 1.63",
    SVG.format("<text x='0' y='20' font-size='8'>tiny</text>"): "small text: tiny 8.0 px",
    f"<b style='color: #999'>{SVG.format('<text x=0 y=20 fill=currentColor>pale</text>')}</b>": "faint text: pale 2.85",
    SVG.format("<text x='280' y='20'>cut off at the side</text>"): "clipped text: cut off at the side",
    SVG.format("<text x='5' y='20'>one label</text><text x='20' y='24'>another</text>"): "overlapping text: one label",
}


@pytest.mark.parametrize(("body", "expected"), BROKEN.items(), ids=BROKEN.values())
def test_a_broken_page_is_found(browser, tmp_path, body, expected):
    page = tmp_path / "broken.html"
    page.write_text(f"<!DOCTYPE html><meta charset='utf-8'><title>x</title><body>{body}<p>fine</p></body>")
    browser.show(page, width=1280)
    found = [*complaints(browser)[1:], *browser.evaluate(LEGIBLE)]
    assert any(each.startswith(expected) for each in found), found
    assert not any("fine" in each for each in found)


def test_a_script_that_got_into_a_page_would_not_run(browser, pages, tmp_path):
    page = tmp_path / "page.html"
    source = pages["classifier"].read_text(encoding="utf-8")
    page.write_text(source.replace("</body>", "<script>document.title = 'ran'</script></body>"), encoding="utf-8")
    browser.show(page, width=1280)
    assert [each for each in complaints(browser) if each.startswith("log: Executing inline script violates")]
    assert browser.evaluate("document.title") == "digits_kd_of_many_images – report"


def test_a_page_without_faults_has_none(browser, tmp_path):
    page = tmp_path / "sound.html"
    drawing = SVG.format("<text x='5' y='15'>one label</text><text x='5' y='35'>another</text>")
    page.write_text(f"<!DOCTYPE html><title>x</title><body><p>fine</p>{drawing}</body>")
    browser.show(page, width=1280)
    assert complaints(browser) == [f"request: {page.as_uri()}"]
    assert browser.evaluate(LEGIBLE) == []
