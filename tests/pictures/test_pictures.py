"""The pictures of the documents show what there is now."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chart.prometheus import panels
from tests.fleet.world import SCENARIOS, World, play
from tests.lab.lab import wait_until
from tests.pictures.terminal import CLEAR, Terminal, picture
from virtbus.commands.fleet import table

DOCS = Path(__file__).resolve().parents[2] / "docs"
PICTURES = sorted(DOCS.glob("*.svg"))


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_a_picture_is_small_and_stands_in_a_page(path: Path) -> None:
    assert ET.parse(path).getroot().tag.endswith("svg")
    assert path.stat().st_size < 150_000
    assert any(f"]({path.name})" in page.read_text() for page in DOCS.glob("*.md"))


# Widths of DejaVu Sans, the widest of the fonts that the pictures name, in ems.
WIDTHS = {"i": 0.28, "j": 0.28, "l": 0.28, "t": 0.39, "f": 0.35, "r": 0.41, " ": 0.32, ".": 0.32, ",": 0.32,
          ":": 0.34, ";": 0.34, "m": 0.97, "w": 0.82, "M": 0.86, "W": 0.99}  # fmt: skip
BOLD = 1.14


def spans(svg: ET.Element) -> Iterator[tuple[str, float, float, float]]:
    """(text, left, right, baseline) of every text of a picture, as wide as it gets."""
    default = float(svg.get("font-size", "13"))
    for text in svg.iter("{http://www.w3.org/2000/svg}text"):
        words, x = text.text or "", float(text.get("x", "0"))
        size = float(text.get("font-size", default)) * (BOLD if text.get("font-weight") == "bold" else 1)
        width = size * sum(WIDTHS.get(letter, 0.61) for letter in words)
        left = x - width * {"middle": 0.5, "end": 1.0}.get(text.get("text-anchor", ""), 0.0)
        yield words, left, left + width, float(text.get("y", "0"))


def test_no_text_of_the_architecture_crosses_the_border_of_its_box() -> None:
    svg = ET.parse(DOCS / "architecture.svg").getroot()
    boxes = [
        tuple(float(one.get(side, "0")) for side in ("x", "y", "width", "height"))
        for one in svg.iter("{http://www.w3.org/2000/svg}rect")
        if not one.get("width", "").endswith("%")
    ]
    crossing = []
    for words, left, right, y in spans(svg):
        middle = (left + right) / 2
        around = [box for box in boxes if box[0] < middle < box[0] + box[2] and box[1] < y < box[1] + box[3]]
        if around:
            x, _, width, _ = min(around, key=lambda box: box[2] * box[3])
            if left < x + 2 or right > x + width - 2:
                crossing.append(words)
    assert crossing == []


def test_the_dashboards_picture_has_every_panel_of_the_dashboard() -> None:
    shown = texts((DOCS / "dashboard.svg").read_text())
    titles = [panel["title"] for panel in panels()]
    assert [title for title in shown if title in titles] == titles


def test_the_fleets_picture_has_the_columns_of_the_command() -> None:
    world = World(SCENARIOS / "01-shared-array-gone.toml")
    *_, (_, view) = play(world)
    heads = [line for line in table(view, rows=None, columns=150) if line.startswith(("STORAGE ", "HOST "))]
    assert len(heads) == 2
    assert set(heads) <= set(texts((DOCS / "fleet.svg").read_text()))


def test_a_screen_is_what_a_command_drew_last_on_a_terminal_of_that_size() -> None:
    code = (
        "import shutil, time\n"
        "for turn in range(1000):\n"
        f"    print({CLEAR!r} + f'turn <{{turn}}>\\n{{shutil.get_terminal_size().columns}}', flush=True)\n"
        "    time.sleep(0.02)\n"
    )
    with Terminal([sys.executable, "-c", code], columns=44, rows=10) as terminal:
        wait_until(lambda: len(terminal.screen()) == 2, "a screen is drawn", 20)
        first = terminal.screen()
        wait_until(lambda: terminal.screen() != first, "the next one is drawn", 20)
        later = terminal.screen()
    assert first[1:] == later[1:] == ["44"]
    assert first[0] != later[0]
    assert texts(picture(later, title="it"))[1:] == later
