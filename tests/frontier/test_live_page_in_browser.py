"""A page of a running study, in a real browser: what arrives does not take from the reader what they hold."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from browser import CHROMIUM, Page, chromium
from frontier_study import make_facts, make_record

from peftsearch.frontier.page import document, page_data

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]

MARKS = "document.querySelectorAll('#front [data-trial]').length"
HELD = "document.querySelector('#budget').dataset.first === 'yes'"


class Running:
    """A study that grows, served as `peftsearch ui` serves one: its page, and its data with an ETag.

    Attributes:
        trials: How many trials it has, each better than the last.
        given: The number of trials in each full answer.
    """

    def __init__(self) -> None:
        self.trials = 2
        self.given: list[int] = []
        study = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                trials, data = study.trials, self.path == "/data.json"
                if data and self.headers["If-None-Match"] == f'"{trials}"':
                    self.send_response(304)
                    self.end_headers()
                    return
                live = {"data": "/data.json", "studies": "/"}
                text = json.dumps(study.data(trials)) if data else document(study.data(trials), live=live)
                self.send_response(200)
                self.send_header("Content-Type", "application/json" if data else "text/html")
                self.send_header("ETag", f'"{trials}"')
                self.end_headers()
                self.wfile.write(text.encode())
                if data:
                    study.given.append(trials)

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def data(self, trials: int) -> dict[str, Any]:
        records = [make_record(number, 0.5 + number / 100, 100 * 4**number) for number in range(trials)]
        return page_data(records, make_facts(), "clinical", state="running")

    def grow(self) -> int:
        """One trial more, which the page has fetched on return; how many there are."""
        self.trials += 1
        deadline = time.monotonic() + 120
        while self.trials not in self.given:
            assert time.monotonic() < deadline, "the page did not ask again"
            time.sleep(0.1)
        return self.trials

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def running() -> Iterator[Running]:
    study = Running()
    yield study
    study.close()


@pytest.fixture
def page(running: Running) -> Iterator[Page]:
    """The page, which has seen its study grow once."""
    with chromium() as tab:
        tab.size(1360, 900)
        tab.open(running.url)
        tab.wait(f"{MARKS} === {running.grow()}")
        tab.evaluate("document.querySelector('#budget').dataset.first = 'yes'")
        yield tab
        assert tab.problems == []


def grow_unseen(running: Running, page: Page) -> None:
    """The study grows, and the page draws nothing of it."""
    before = page.evaluate(MARKS)
    running.grow()
    page.evaluate("new Promise(done => setTimeout(done, 1500))")
    assert page.evaluate(HELD)
    assert page.evaluate(MARKS) == before


def test_a_slider_stays_under_the_finger(page: Page, running: Running) -> None:
    x, y = page.middle("#budget")
    mouse = {"x": x, "y": y, "button": "left", "buttons": 1, "clickCount": 1}
    page.call("Input.dispatchMouseEvent", type="mousePressed", **mouse)
    limit = page.evaluate("document.querySelector('output').textContent")
    assert limit.startswith("at most ")
    page.evaluate("document.querySelector('#budget').dataset.first = 'yes'")
    # The released slider may leave one trial: no mark is counted here.
    running.grow()
    page.evaluate("new Promise(done => setTimeout(done, 1500))")
    assert page.evaluate(HELD)
    page.call("Input.dispatchMouseEvent", type="mouseMoved", **(mouse | {"x": x - 30}))
    assert page.evaluate("document.querySelector('output').textContent") != limit
    page.call("Input.dispatchMouseEvent", type="mouseReleased", **(mouse | {"x": x - 30, "buttons": 0}))
    page.wait(f"document.querySelector('#table').innerText.includes('of {running.trials}')")
    assert not page.evaluate(HELD)
    assert page.evaluate("document.activeElement.id") == "budget"


def test_an_open_list_stays_open(page: Page, running: Running) -> None:
    page.click("#axis")
    page.wait("document.querySelector('#axis').matches(':open')", 20)
    grow_unseen(running, page)
    assert page.evaluate("document.querySelector('#axis').matches(':open')")
    page.key("Escape")
    page.wait(f"{MARKS} === {running.trials}")
    # A list that has the focus and is closed holds nothing.
    assert page.evaluate("document.activeElement.id") == "axis"
    page.wait(f"{MARKS} === {running.grow()}")


def test_a_marked_text_stays_marked(page: Page, running: Running) -> None:
    page.evaluate("getSelection().selectAllChildren(document.querySelector('.verdict'))")
    text = page.evaluate("getSelection().toString()")
    assert text
    grow_unseen(running, page)
    assert page.evaluate("getSelection().toString()") == text
    page.evaluate("getSelection().removeAllRanges()")
    page.wait(f"{MARKS} === {running.trials}")


def test_a_click_is_not_lost_between_press_and_release(page: Page, running: Running) -> None:
    x, y = page.middle("[data-focus=pruned]")
    mouse = {"x": x, "y": y, "button": "left", "clickCount": 1}
    page.call("Input.dispatchMouseEvent", type="mousePressed", buttons=1, **mouse)
    grow_unseen(running, page)
    page.call("Input.dispatchMouseEvent", type="mouseReleased", buttons=0, **mouse)
    page.wait(f"{MARKS} === {running.trials}")
    assert page.evaluate("document.querySelector('[data-focus=pruned]').ariaPressed") == "false"
