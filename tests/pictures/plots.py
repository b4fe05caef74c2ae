"""The dashboard's panels as an SVG, drawn from what a real Prometheus answered to their queries.

Each panel stands where the dashboard puts it, with the dashboard's title, legends, units and thresholds.
What was broken when is a band across the panels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any
from xml.sax.saxutils import escape

from tests.pictures.world import Seen

COLUMN, ROW, GAP, TOP = 42, 28, 8, 46  # pixels; a dashboard has 24 columns
WIDTH = 24 * COLUMN + GAP
LETTER = 6.6  # pixels of a letter of 11 px, rather too many: fonts differ
LINES = ("#5a9e4b", "#d99a1c", "#2f9fc4", "#e0752d", "#d9534f", "#5b7fd6", "#b863b3", "#8c7ae0")
BANDS = ("#5b7fd6", "#d99a1c", "#d9534f", "#8c7ae0")
STATES = {"green": "#3c8c4c", "orange": "#c26a17", "red": "#b93a36"}

STYLE = """
text { fill: #24292f; font: 11px -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif }
.ground { fill: #f0f2f5 } .panel { fill: #ffffff; stroke: #dde1e6 } .soft { fill: #57606a }
.grid { fill: none; stroke: #e3e7ec } .line { fill: none; stroke-width: 1.7; stroke-linejoin: round }
.title { font-weight: bold; font-size: 12px } .big { font-weight: bold; font-size: 26px }
.state, .state text { fill: #ffffff }
@media (prefers-color-scheme: dark) {
  text { fill: #d8d9da }
  .ground { fill: #111217 } .panel { fill: #1b1e24; stroke: #2a2e36 } .soft { fill: #a3acb6 }
  .grid { stroke: #2c3038 }
  .state, .state text { fill: #ffffff }
}
"""


def picture(seen: Seen) -> str:
    """All panels."""
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in seen.panels)
    height = TOP + ROW * bottom + GAP
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}">',
            "<title>The dashboard's panels during the run</title>",
            f"<style>{STYLE}</style>",
            '<rect class="ground" width="100%" height="100%" rx="8"/>',
            *_head(seen),
            *(line for panel in seen.panels for line in _panel(panel, seen)),
            "</svg>",
            "",
        ]
    )


def _head(seen: Seen) -> Iterator[str]:
    yield f'<text class="title" x="{2 * GAP}" y="28" style="font-size: 16px">virtbus</text>'
    x = float(WIDTH - GAP)
    for index, (what, _, _) in reversed(list(enumerate(seen.breakages))):
        x -= LETTER * len(what) + 34
        yield f'<rect x="{x:.0f}" y="17" width="14" height="14" fill="{BANDS[index]}" opacity="0.55"/>'
        yield f'<text x="{x + 20:.0f}" y="28">{escape(what)}</text>'


def _panel(panel: dict[str, Any], seen: Seen) -> Iterator[str]:
    where = panel["gridPos"]
    left, top = GAP + where["x"] * COLUMN, TOP + where["y"] * ROW
    width, height = where["w"] * COLUMN - GAP, where["h"] * ROW - GAP
    draw = {"timeseries": _timeseries, "stat": _stat, "table": _table}[panel["type"]]
    yield f'<g transform="translate({left} {top})">'
    yield f'<rect class="panel" width="{width}" height="{height}" rx="4"/>'
    yield from draw(panel, seen, width, height)
    yield "</g>"


def _title(panel: dict[str, Any], size: float = 12) -> str:
    return f'<text class="title" x="10" y="19" style="font-size: {size:g}px">{escape(panel["title"])}</text>'


def _timeseries(panel: dict[str, Any], seen: Seen, width: float, height: float) -> Iterator[str]:
    """Lines over the minutes of the run, the legend below."""
    defaults = panel["fieldConfig"]["defaults"]
    named = [
        (_legend(target, one), _values(one, seen)) for target in panel["targets"] for one in target["series"]
    ]
    rows = _rows([name for name, _ in named], width - 20)
    left, right, top, bottom = 52.0, width - 12.0, 32.0, height - 26.0 - 15 * len(rows)
    highest = max((one for _, values in named for one in values if one is not None), default=0.0)
    marks = _marks(defaults.get("max", 1.05 * highest), whole=defaults["unit"] == "short")
    minutes = (seen.end - seen.start) / 60

    def x(minute: float) -> float:
        return left + (right - left) * minute / minutes

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / marks[-1]

    yield _title(panel)
    for index, (_, since, until) in enumerate(seen.breakages):
        begin, end = (x((moment - seen.start) / 60) for moment in (since, until))
        yield (
            f'<rect x="{begin:.1f}" y="{top}" width="{end - begin:.1f}" height="{bottom - top:.1f}" '
            f'fill="{BANDS[index]}" opacity="0.22"/>'
        )
    yield f'<path class="grid" d="{"".join(f"M{left} {y(mark):.1f}H{right}" for mark in marks)}"/>'
    for mark in marks:
        said = _in_unit(mark, defaults["unit"], marks[-1])
        yield f'<text class="soft" x="{left - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{said}</text>'
    for minute in range(int(minutes) + 1):
        said = f"{minute} min" if minute == int(minutes) else f"{minute}"
        place = f'x="{x(minute):.1f}" y="{bottom + 15:.1f}" text-anchor="middle"'
        yield f'<text class="soft" {place}>{said}</text>'
    for index, (_, values) in enumerate(named):
        points = [(x(at * seen.step / 60), None if one is None else y(one)) for at, one in enumerate(values)]
        yield f'<path class="line" stroke="{LINES[index % len(LINES)]}" d="{_path(points)}"/>'
    for row, names in enumerate(rows):
        at = height - 10 - 15 * (len(rows) - 1 - row)
        for index, start in names:
            colour = LINES[index % len(LINES)]
            yield f'<rect x="{10 + start:.0f}" y="{at - 5}" width="10" height="3" fill="{colour}"/>'
            yield f'<text class="soft" x="{24 + start:.0f}" y="{at}">{escape(named[index][0])}</text>'


def _stat(panel: dict[str, Any], seen: Seen, width: float, height: float) -> Iterator[str]:
    """The last value on its threshold's colour, with the way to it."""
    defaults = panel["fieldConfig"]["defaults"]
    (series,) = panel["targets"][0]["series"]
    values = _values(series, seen)
    last = [one for one in values if one is not None][-1]
    reached = [step["color"] for step in defaults["thresholds"]["steps"] if last >= (step["value"] or 0)]
    most = max(1.0, *(one for one in values if one is not None))
    points = [
        (width * at / (len(values) - 1), None if one is None else height - 30 * one / most)
        for at, one in enumerate(values)
    ]
    known = [(x, y) for x, y in points if y is not None]
    area = f"{_path(points)}L{known[-1][0]:.1f} {height}L{known[0][0]:.1f} {height}Z"
    yield '<g class="state">'
    yield f'<rect width="{width}" height="{height}" rx="4" style="fill: {STATES[reached[-1]]}"/>'
    yield f'<path d="{area}" opacity="0.3"/>'
    yield _title(panel, min(12, (width - 12) / (0.62 * len(panel["title"]))))
    said = _in_unit(last, defaults["unit"], last)
    yield f'<text class="big" x="{width / 2}" y="{height / 2 + 14}" text-anchor="middle">{said}</text></g>'


def _table(panel: dict[str, Any], seen: Seen, width: float, height: float) -> Iterator[str]:
    """A row a series: its name, and the last value."""
    yield _title(panel)
    (target,) = panel["targets"]
    for row, series in enumerate(target["series"]):
        last = [one for one in _values(series, seen) if one is not None][-1]
        yield f'<text x="10" y="{50 + 18 * row}">{escape(_legend(target, series))}</text>'
        yield f'<text x="{width - 10}" y="{50 + 18 * row}" text-anchor="end">{last:g}</text>'


def _legend(target: dict[str, Any], series: dict[str, Any]) -> str:
    labels = series["metric"]
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), target["legendFormat"])


def _values(series: dict[str, Any], seen: Seen) -> list[float | None]:
    """One value a step of the run; None where there was none, or no number."""
    found = {round((when - seen.start) / seen.step): float(value) for when, value in series["values"]}
    number = round((seen.end - seen.start) / seen.step) + 1
    return [value if math.isfinite(value := found.get(at, math.nan)) else None for at in range(number)]


def _path(points: Sequence[tuple[float, float | None]]) -> str:
    """A line that breaks where there is no value; a value alone is a short dash."""
    drawn = ""
    previous: float | None = None
    for at, (x, y) in enumerate(points):
        if y is not None:
            alone = previous is None and (at + 1 == len(points) or points[at + 1][1] is None)
            drawn += f"{'M' if previous is None else 'L'}{x:.1f} {y:.1f}" + ("h2" if alone else "")
        previous = y
    return drawn


def _marks(most: float, *, whole: bool) -> list[float]:
    """Round numbers from 0 to the first that is not below `most`."""
    step = 10.0 ** math.floor(math.log10(most / 4)) if most else 1.0
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if 4 * step * factor >= most * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    return [step * index for index in range(max(1, math.ceil(most / step - 0.001)) + 1)]


def _rows(names: Sequence[str], width: float) -> list[list[tuple[int, float]]]:
    """(index, x) of each name of a legend, in rows that fit."""
    rows: list[list[tuple[int, float]]] = [[]]
    x = 0.0
    for index, name in enumerate(names):
        needed = 30 + LETTER * len(name)
        if x + needed > width and rows[-1]:
            rows.append([])
            x = 0.0
        rows[-1].append((index, x))
        x += needed
    return rows


def _in_unit(value: float, unit: str, most: float) -> str:
    if unit == "percentunit":
        return f"{value * 100:g} %"
    if unit == "s":
        return f"{value * 1000:.3g} ms" if 0 < most < 1 else f"{value:.3g} s"
    said = f"{value / 1000:g}k" if value >= 1000 else f"{value:.3g}"
    return f"{said}/s" if unit == "ops" else said
