"""The page, in headless Chromium: it loads, an answer streams into it, and it shows the meshes."""

from __future__ import annotations

import asyncio
import os

import pytest
from browser import CHROMIUM, chromium
from fake import live

from disagg_tt.errors import PeerError

pytestmark = [
    pytest.mark.browser,
    pytest.mark.xdist_group("browser"),  # one Chromium at a time
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]
ANSWERS = "[...document.querySelectorAll('#turns li.assistant p')].map((p) => p.textContent)"


def in_browser(backend, tokenizer, folder, drive, **changes):
    """Run `drive(browser, loop)` on a thread, the page being open, while the server runs in the loop."""

    async def main():
        loop = asyncio.get_running_loop()

        def with_browser(address):
            with chromium(folder / "profile") as browser:
                browser.open("http://{}:{}/".format(*address))
                drive(browser, loop)
                if "DISAGG_TT_SCREENSHOTS" in os.environ:
                    browser.screenshot(folder / "page.png")

        async with live(backend, tokenizer, **changes) as address:
            await asyncio.to_thread(with_browser, address)

    asyncio.run(main())


def ask(browser, text):
    browser.until("document.querySelector('#model')?.textContent")
    browser.evaluate(f"document.querySelector('#text').value = {text!r}")
    browser.evaluate("document.querySelector('#ask').requestSubmit()")


def test_an_answer_streams_in_and_the_chat_goes_on(backend, tokenizer, tmp_path):
    go_on = asyncio.Event()

    def script(wanted):
        steps = backend.says("The capital of <b>Peru</b> is Lima.", wanted)
        return [*steps[:3], go_on, *steps[3:]]

    backend.script = script

    def drive(browser, loop):
        ask(browser, "What is the capital of Peru?")
        browser.until(f"{ANSWERS}[0]?.startsWith('The')")  # a part is shown while the rest is still to come
        assert not browser.evaluate(f"{ANSWERS}[0].endsWith('Lima.')")
        assert browser.evaluate("!document.querySelector('#stop').hidden")
        loop.call_soon_threadsafe(go_on.set)
        cost = browser.until("document.querySelector('#turns .cost')?.textContent")
        assert browser.evaluate(f"{ANSWERS}[0]") == "The capital of <b>Peru</b> is Lima."
        prompt = len(backend.streams[0].wanted.tokens)
        assert cost == f"12.0 ms to the first token · {prompt // 2} of {prompt} prompt tokens cached · pd"
        ask(browser, "And of Chile?")
        browser.until("document.querySelectorAll('#turns .cost').length === 2")

    in_browser(backend, tokenizer, tmp_path, drive)
    first, second = (stream.wanted for stream in backend.streams)
    assert first.conversation == second.conversation is not None
    assert "is Lima." in tokenizer.decode(second.tokens) and "And of Chile?" in tokenizer.decode(
        second.tokens
    )


def test_stopping_ends_the_generation(backend, tokenizer, tmp_path):
    backend.script = lambda wanted: [*backend.says("One two three", wanted)[:3], asyncio.Event()]

    def drive(browser, loop):
        ask(browser, "Count")
        browser.until(f"{ANSWERS}[0]")
        browser.evaluate("document.querySelector('#stop').click()")
        browser.until("document.querySelector('#turns small')?.textContent === 'Stopped.'")
        asyncio.run_coroutine_threadsafe(backend.streams[0].closed.wait(), loop).result(60)

    in_browser(backend, tokenizer, tmp_path, drive)


def test_a_new_chat_knows_nothing_of_the_one_before(backend, tokenizer, tmp_path):
    backend.script = lambda wanted: [*backend.says("One two three", wanted)[:3], asyncio.Event()]

    def drive(browser, loop):
        ask(browser, "Count")
        browser.until(f"{ANSWERS}[0]")
        backend.script = lambda wanted: backend.says("Lima.", wanted)
        browser.evaluate("document.querySelector('#anew').click()")  # while the answer still comes
        for number in (1, 2):
            ask(browser, "Where?")
            browser.until(f"document.querySelectorAll('#turns .cost').length === {number}")

    in_browser(backend, tokenizer, tmp_path, drive)
    before, first, second = (stream.wanted for stream in backend.streams)
    assert before.conversation != first.conversation == second.conversation
    said = tokenizer.decode(second.tokens)
    assert said.count("Where?") == 2 and "Lima." in said and "Count" not in said and "One" not in said


def test_a_failure_is_shown_and_the_question_can_be_sent_again(backend, tokenizer, tmp_path):
    backend.script = lambda wanted: [PeerError("the decode rank died")]

    def drive(browser, loop):
        ask(browser, "Hello?")
        assert browser.until("document.querySelector('#turns .error')?.textContent") == "the decode rank died"
        assert browser.evaluate("document.querySelector('#text').value") == "Hello?"

    in_browser(backend, tokenizer, tmp_path, drive)


def test_the_meshes_are_shown_and_the_mode_can_be_set(backend, tokenizer, tmp_path):
    def drive(browser, loop):
        browser.until("document.querySelectorAll('.worker').length === 2")
        shown = browser.evaluate("document.querySelector('#state').innerText")
        for part in ("prefill-0", "busy", "decode-0", "Slots 1 of 32", "Blocks 8 of 256, 16 cached", "waiting",
                     "prefill-0 → decode-0, 96 tokens, 393 kB", "18.0 ms hidden, 4.0 ms exposed, handover 6.0 ms"):  # fmt: skip
            assert part in shown
        assert browser.evaluate("document.querySelectorAll('.transfer .track').length") == 5
        browser.evaluate("document.querySelector('#modes button[value=ppd]').click()")
        browser.until("document.querySelector('#modes [aria-pressed=true]')?.value === 'ppd'")

    in_browser(backend, tokenizer, tmp_path, drive)
    assert backend.mode == "ppd"


def test_the_page_asks_for_the_api_key(backend, tokenizer, tmp_path):
    def drive(browser, loop):
        browser.until("document.querySelector('#ask-key')?.open")
        assert browser.evaluate("document.querySelectorAll('.worker').length") == 0
        for key in ("wrong", "s3cret"):
            browser.until("document.querySelector('#ask-key').open")
            browser.evaluate(f"document.querySelector('#key').value = '{key}'")
            browser.evaluate("document.querySelector('#ask-key button').click()")
        browser.until("document.querySelectorAll('.worker').length === 2")

    in_browser(backend, tokenizer, tmp_path, drive, api_key="s3cret")
