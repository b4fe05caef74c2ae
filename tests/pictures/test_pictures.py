"""The pictures of the documents show what there is now."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
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
