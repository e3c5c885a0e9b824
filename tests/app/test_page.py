"""The server's page and a run's report in headless Chromium; skipped where there is none."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorakit
from tests.app.test_server import Running, serve
from tests.browser import PATH, Tab, browser
from tests.related import FEELINGS, THINGS, recipe
from tests.runs import fit
from tests.shipped import ship

pytestmark = pytest.mark.skipif(PATH is None, reason="no Chromium here")

RUNS = "<img src=x onerror=\"document.title='run'\">"
NAME = "names & <b>places<b>"
PHONE, DESK = 360, 1280


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("shown")
    ship(folder / "mood", bert, "sequence_classification", (RUNS, "good"), seed=1)
    ship(folder / "topic", bert, "sequence_classification", ("one", "two", "three"), seed=2)
    with serve(folder) as server:
        yield server


@pytest.fixture(scope="module")
def tagging(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("marked")
    ship(folder / NAME, bert, "token_classification", ("O", "B-LOC", "I-LOC", "B-PER", "I-PER"), seed=3)
    with serve(folder) as server:
        yield server


@pytest.fixture(scope="module")
def searching(tmp_path_factory: pytest.TempPathFactory, encoder: Path, tables: Path) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("found")
    fit(recipe(encoder, tables / "pairs.csv", "train.max_steps=1"), folder / "search")
    with serve(folder) as server:
        yield server


def ask(page: Tab, running: Running, adapter: str, text: str) -> None:
    """Choose, write and send as a person does, and wait for the answer."""
    page.open(f"http://127.0.0.1:{running.port}/")
    page.wait("document.getElementById('adapter').options.length > 0")
    page.run(f"at('adapter').value = {json.dumps(adapter)}; at('text').value = {json.dumps(text)}; at('send').click()")
    page.wait("!at('answer').hidden && !at('send').disabled")


def test_page_begins_with_examples_of_the_adapter(page: Tab, running: Running) -> None:
    page.open(f"http://127.0.0.1:{running.port}/")
    page.wait("document.querySelectorAll('#examples button').length > 0")
    assert page.run("document.querySelectorAll('.bad').length") == 0


def assert_harmless(page: Tab) -> None:
    assert page.run("document.title") == "lorakit"
    assert page.run("document.images.length + document.querySelectorAll('b').length") == 0


@pytest.mark.parametrize(
    ("adapter", "text"),
    [
        ("mood", "a fine film"),
        ("mood", RUNS),
        ("mood", "\N{GRINNING FACE} </p><script>document.title='run'</script>"),
        ("topic", "a fine film"),
    ],
)
def test_page_shows_labels_and_their_shares(page: Tab, running: Running, adapter: str, text: str) -> None:
    ask(page, running, adapter, text)
    shown = page.run("[...document.querySelectorAll('#shown li')].map(line => line.innerText.trim())")
    found = running.predict(text, adapter=adapter).json
    shares = [f"{100 * entry['score']:.1f} %" for entry in found]
    assert [line.split("\n") for line in shown] == [
        [entry["label"], share] for entry, share in zip(found, shares, strict=True)
    ]
    assert_harmless(page)


def test_page_marks_entities_where_they_are(page: Tab, tagging: Running) -> None:
    text = "\N{GRINNING FACE} Ada met Omar in <b>Oslo</b>, Ines was in Cairo"
    ask(page, tagging, NAME, text)
    entities = tagging.predict(text).json
    assert entities
    marks = page.run("[...document.querySelectorAll('#shown mark')].map(mark => mark.firstChild.textContent)")
    assert marks == [text[entity["start"] : entity["end"]] for entity in entities]
    whole = "document.querySelector('#shown .text').cloneNode(true)"
    page.run(f"window.copied = {whole}; copied.querySelectorAll('small').forEach(label => label.remove())")
    assert page.run("copied.textContent") == text
    assert_harmless(page)


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_examples_are_answered_and_history_shows_them_again(
    page: Tab, running: Running, tagging: Running, width: int
) -> None:
    page.resize(width)
    ask(page, running, "mood", RUNS)
    assert "ms" in page.run("at('took').textContent")
    page.run("at('examples').firstChild.click()")
    page.wait("at('entries').children.length === 2 && !at('send').disabled")
    shown = page.run("at('shown').innerText")
    page.run("at('adapter').value = 'topic'; at('entries').lastChild.click()")  # the older one
    page.wait("at('adapter').value === 'mood' && at('text').value.startsWith('<img')")
    page.wait(f"at('shown').innerText !== {json.dumps(shown)}")
    page.run("at('entries').firstChild.click()")
    page.wait(f"at('shown').innerText === {json.dumps(shown)}")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert_harmless(page)
    page.open(f"http://127.0.0.1:{tagging.port}/")
    page.wait("at('examples').children.length > 0")
    assert "Nairobi" in page.run("at('examples').innerText")


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_question_is_searched_for_in_the_texts_of_the_page(page: Tab, searching: Running, width: int) -> None:
    """More texts than a request may have, by their similarity to the question, the best ten."""
    page.resize(width)
    page.open(f"http://127.0.0.1:{searching.port}/")
    page.wait("at('send').textContent === 'Search'")
    assert page.run("at('pair').value.split('\\n').length") == 8
    page.run("at('examples').firstChild.click()")
    page.wait("!at('answer').hidden && !at('send').disabled")
    texts = [f"the {thing} was {feeling}" for thing in THINGS for feeling in FEELINGS]
    page.run(
        f"at('pair').value = {json.dumps(chr(10).join([*texts, ' ']))}; at('text').value = 'superb'; at('send').click()"
    )
    page.wait("at('entries').children.length === 2 && !at('send').disabled")
    shown = page.run("[...document.querySelectorAll('#shown li')].map(line => line.children[1].textContent)")
    best = lorakit.load(searching.root / "search").rank("superb", texts, top=10)
    assert shown == [entry["text"] for entry in best]
    assert page.run("document.documentElement.scrollWidth") <= width
    page.run("at('pair').value = ' '; at('send').click()")
    page.wait("document.querySelectorAll('#shown .bad').length === 1")


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_command_that_is_copied_gives_the_same_answer(page: Tab, running: Running) -> None:
    text = 'it\'s a "fine" film; $HOME `id`'
    ask(page, running, "mood", text)
    page.run("at('copy').click()")
    page.wait("!at('curl').hidden")
    done = subprocess.run(["/bin/sh", "-c", page.run("at('curl').textContent")], capture_output=True, check=True)
    assert json.loads(done.stdout) == running.predict(text, adapter="mood").json


def test_refusal_is_told_on_the_page(page: Tab, running: Running) -> None:
    ask(page, running, "mood", "word " * 1000)
    assert page.run("document.querySelector('#shown .bad').textContent").startswith("a text has 5000 characters")


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_is_wider_than_the_screen(page: Tab, running: Running, bert_run: Path, width: int) -> None:
    page.resize(width)
    ask(page, running, "mood", "word" * 200)
    assert page.run("document.documentElement.scrollWidth") <= width
    page.open((bert_run / "report.html").resolve().as_uri())
    assert page.run("document.documentElement.scrollWidth") <= width
