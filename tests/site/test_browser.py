"""The site and the demo in a real Chromium. Run by `make browser`, in its own environment."""

import functools
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pandas as pd
import pytest
from bs4 import BeautifulSoup
from conftest import ROOT
from PIL import Image

pytest.importorskip("playwright", reason="lives in its own environment: make browser")

from playwright.sync_api import Page, expect, sync_playwright

from awares.clients import launch

TABLES = ROOT / "reports" / "mini" / "tables"
NAMES = {"full": "full resolution", "half": "half resolution", "sft": "SFT", "awares": "AwaRes"}
WIDER = "document.documentElement.scrollWidth - innerWidth"


def build(folder: Path, config: Path = ROOT / "site" / "mkdocs.yml") -> Path:
    mkdocs = str(ROOT / ".venv-site" / "bin" / "mkdocs")
    command = [mkdocs, "build", "--strict", "--quiet", "-f", str(config), "-d", str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, timeout=120)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site and its address on a server of this machine."""
    folder = build(tmp_path_factory.mktemp("site"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(SimpleHTTPRequestHandler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    found = shutil.which(os.environ.get("CHROMIUM") or "chromium")
    if not found:
        pytest.skip("NO CHROMIUM on PATH, and none named by CHROMIUM=/path: nothing was tested in a browser")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])


def opened(browser, address: str, width: int = 1280) -> tuple[Page, list[str]]:
    """The loaded page and the list to which it adds errors and requests to other hosts."""
    page, faults = browser.new_page(viewport={"width": width, "height": 900}), []
    page.on("console", lambda one: faults.append(one.text) if one.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    own = (address.split("/", 3)[2], "")
    page.on("request", lambda one: None if one.url.split("/", 3)[2] in own else faults.append(one.url))
    page.goto(address)
    return page, faults


def test_every_page_opens_at_both_widths_without_errors_and_other_hosts_and_every_link_resolves(site, browser):
    folder, address = site
    pages = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*.html"))]
    assert len(pages) > 15 and sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 30e6
    for name, width in itertools.product(pages, (1280, 390)):
        page, faults = opened(browser, f"{address}/{name}", width)
        assert (faults, page.evaluate(WIDER)) == ([], 0), (name, width)
        page.close()
    assert broken(folder) == []


def broken(folder: Path) -> list[tuple[str, str]]:
    """Links to files or anchors that the site does not have."""
    pages = {file: BeautifulSoup(file.read_text(), "html.parser") for file in folder.rglob("*.html")}
    anchors = {
        file: {"", *(one.get("id", one.get("name")) for one in page.select("[id],[name]"))}
        for file, page in pages.items()
    }
    found = []
    for file, page in pages.items():
        for target in [str(one.get("href") or one.get("src") or "") for one in page.select("[href],[src]")]:
            path, anchor = urldefrag(unquote(target))
            there = (folder / path.lstrip("/") if path.startswith("/") else file.parent / (path or file.name)).resolve()
            there = there / "index.html" if there.is_dir() else there
            wrong = not there.is_file() or anchor not in anchors.get(there, {anchor})
            if not re.match(r"https?:|mailto:|data:", target) and wrong and "explorer.html#" not in target:
                found.append((file.name, target))
    return found


PATHS = {  # what a newcomer looks for: the links to click on the first page, and what the last page says
    "the main result": (["the report"], "Accuracy and tokens"),
    "a failure and its cause": (["rows that fail"], "what went wrong"),
    "how to run it": ([], "make repro"),
    "how to change the reward": (["04_grpo"], "reward"),
    "what is not proven": ([], "not decidable here"),
}


@pytest.mark.parametrize("wanted", PATHS)
def test_a_newcomer_finds_by_clicks(site, browser, wanted):
    page, faults = opened(browser, f"{site[1]}/index.html")
    clicks, text = PATHS[wanted]
    for words in clicks:
        page.locator("article a", has_text=words).first.click()
    expect(page.locator("article")).to_contain_text(text, timeout=60_000)  # waits: a long page arrives in parts
    assert not faults


def numbers(page: Page, table: str) -> dict[str, dict[str, float]]:
    lines = page.locator(f"#{table} tr[data-system]").all()
    return {one.get_attribute("data-system"): json.loads(one.get_attribute("data-exact")) for one in lines}


def test_the_explorer_shows_the_numbers_of_the_tables(site, browser):
    page, faults = opened(browser, f"{site[1]}/explorer.html")
    dial, main = pd.read_csv(TABLES / "dial.csv").query("rows == 'all'"), pd.read_csv(TABLES / "table1_main.csv")
    for place, (bias, points) in enumerate(dial.groupby("call_bias")):
        page.locator("#bias").fill(str(place))
        assert float(page.locator("#bias-value").inner_text().split(" ")[0]) == bias
        shown = numbers(page, "summary")
        for one in points.itertuples():
            expected = [one.accuracy, 100 * one.rtr, one.call_rate]
            own = shown[one.system]
            values = [own["accuracy"], 100 * own["rtr"], own["calls"]]
            assert values == pytest.approx(expected, abs=0.1)  # one row of 1200 that lies on an edge
    page.locator("#reset").click()
    for task, rows in main[main.system.isin(NAMES) & (main.benchmark != "average")].groupby("benchmark"):
        page.locator("#task").select_option(task)
        shown = numbers(page, "selected")
        for one in rows.itertuples():
            values = [shown[one.system][name] for name in ("accuracy", "rtr")]
            assert values == pytest.approx([one.accuracy, one.rtr], abs=1e-4)
    page.locator("#reset").click()
    for one in pd.read_csv(TABLES / "errors.csv").query("kind != 'correct'").itertuples():
        page.locator("#policy").select_option(one.system)
        page.locator("#kind").select_option(one.kind)
        assert page.locator("#selected caption").inner_text().startswith(f"{one.rows} of ")
    assert faults == []


def test_the_explorer_filters_and_shows_the_turns(site, browser):
    page, _ = opened(browser, f"{site[1]}/explorer.html#result=won&decision=call")
    caption = page.locator("#selected caption")
    count = int(caption.inner_text().split()[0])
    assert 0 < count < 1200 and page.locator("#result").input_value() == "won"
    page.locator(".card summary").first.click()
    assert "<tool_call>" in page.locator(".card details").first.inner_text()
    assert page.locator(".card .view .crop").count() >= page.locator(".card").count() == min(count, 24)
    page.locator("#bias").fill("0")  # the least bias
    assert int(caption.inner_text().split()[0]) < 0.1 * count  # a few write a call without its first token
    page.locator("#decision").select_option("turned")
    page.locator("#result").select_option("")
    assert int(caption.inner_text().split()[0]) > count


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The address of `awares demo` with the shipped policy."""
    port = launch._free_port()
    command = [sys.executable, "-m", "awares", "demo", "--port", str(port)]
    log = (tmp_path_factory.mktemp("demo") / "log.txt").open("w+")
    process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
    for _ in range(180):
        with socket.socket() as probe:
            if process.poll() is not None or probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(1)
    assert process.poll() is None, log.seek(0) or log.read()
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(30)


def ask(page: Page, words: str) -> None:
    """Click Ask until the page says ``words``: while it decodes a picture, a click may come before the upload."""
    for _ in range(12):
        page.locator("#ask").click()
        page.wait_for_timeout(5000)
        if words in page.locator("#said").inner_text():
            return
    raise AssertionError(page.locator("#said").inner_text())


def test_the_demo_answers_and_survives(demo, browser, tmp_path):
    page, faults = opened(browser, demo)
    said, turns, wait = page.locator("#said"), page.locator("#turns img"), {"timeout": 90_000}
    page.get_by_text("look up ben.").first.click()
    page.wait_for_function("document.querySelector('#question textarea').value == 'look up ben.'")
    page.locator("#ask").click()
    page.locator("#systems table").wait_for(**wait)
    assert "Probability of a call" in said.inner_text() and "$67" in page.locator("#systems").inner_text()
    assert "requests" in said.inner_text() and turns.is_visible() and page.evaluate(WIDER) == 0 and faults == []
    for _ in range(10):
        page.locator("#ask").click(force=True)
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    for name, words in {"large": "10000 x 10000 px", "broken": "corrupt or not an image"}.items():
        page.locator("#image button[aria-label='Remove Image']").click(**wait)
        with page.expect_response(lambda one: "/upload?" in one.url, **wait):
            page.locator("#image input[type=file]").set_input_files(tmp_path / f"{name}.png")
        ask(page, words)
    page.get_by_text("how high is the bar of fish?").first.click()
    page.wait_for_function("document.querySelector('#question textarea').value.startsWith('how high')")
    page.locator("#question textarea").fill("which breed of spaniel is it?")
    ask(page, "not learned: breed, spaniel")
