"""A run as text, and as the table and plot of docs/benchmarks.md. The page's prose is kept."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from tests.bench.measure import Row

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, DATA, PLOT = DOCS / "benchmarks.md", DOCS / "benchmarks.json", DOCS / "benchmarks.svg"
BEGIN, END = "<!-- run: written by `python -m tests.bench --write` -->", "<!-- end of run -->"


def as_text(rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    cells = [("what", "median", "range", "goal", "")]
    cells += [(row.what, *_figures(row), row.verdict) for row in rows]
    widths = [max(len(each[column]) for each in cells) for column in range(5)]
    return "\n".join(
        "  ".join(text.ljust(width) if not at else text.rjust(width) for at, (text, width) in
                  enumerate(zip(line, widths, strict=True))).rstrip()
        for line in cells
    )  # fmt: skip


def _figures(row: Row) -> tuple[str, str, str]:
    low, high = row.number(min(row.values)), row.number(max(row.values))
    goal = "" if row.goal is None else f"{'≥' if row.least else '≤'} {row.goal:,g}"
    return f"{row.number(row.median)} {row.unit}".strip(), low if low == high else f"{low} – {high}", goal


def write(found: Mapping[str, Sequence[Row]], speed: float) -> None:
    """Put these families' rows into the page, its data and its plot; `speed`: `measure.speed()`."""
    data = json.loads(DATA.read_text()) if DATA.exists() else {}
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    for name, rows in found.items():
        load = f"{os.getloadavg()[1]:.1f}"
        data[name] = {
            "day": day,
            "load": load,
            "speed": f"{speed:.1f}",
            "rows": [row.as_json() for row in rows],
        }
    DATA.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    families = {name: [Row.of_json(row) for row in each["rows"]] for name, each in data.items()}
    PLOT.write_text(plot(families))
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{_tables(families, data)}\n{END}{after}")


def _tables(families: Mapping[str, Sequence[Row]], data: Mapping[str, Mapping[str, str]]) -> str:
    lines = [f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}.", ""]
    for name, rows in families.items():
        facts = data[name]
        speed = f", speed {facts['speed']}" if "speed" in facts else ""
        command = f"`python -m tests.bench --only {name}`"
        lines += [f"### {name}", "", f"{command}, {facts['day']}, load {facts['load']}{speed}.", ""]
        lines += ["| what | median | range | goal | |", "|---|---:|---:|---:|---|"]
        lines += [f"| {row.what} | {' | '.join(_figures(row))} | {row.verdict} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def plot(families: Mapping[str, Sequence[Row]]) -> str:
    """Bars of what each way publishes a second, with the range of the rounds, by hand: no library."""
    groups = [
        (title, [row for row in families.get(name, ()) if row.unit == "events/s"])
        for title, name in (("RabbitMQ, confirmed", "publish"), ("Kafka, acks=all", "kafka"))
    ]
    out: list[str] = []
    y = 10
    for title, rows in groups:
        if not rows:
            continue
        scale = 400 / max(max(row.values) for row in rows)
        out.append(f'<text x="10" y="{y + 14}" font-weight="bold">{escape(title)}, events a second</text>')
        y += 26
        for row in rows:
            width, low, high = (value * scale for value in (row.median, min(row.values), max(row.values)))
            colour = "#2a6fbb" if "virtbus" in row.what else "#9aa7b4"
            name = escape(row.what.partition(": ")[2])
            out.append(f'<text x="250" y="{y + 13}" text-anchor="end">{name}</text>')
            out.append(f'<rect x="260" y="{y}" width="{width:.1f}" height="18" fill="{colour}"/>')
            out.append(
                f'<path d="M{260 + low:.1f} {y + 9}H{260 + high:.1f}" stroke="#222" stroke-width="1.5"/>'
            )
            out.append(f'<text x="{266 + high:.1f}" y="{y + 13}">{row.number(row.median)}</text>')
            y += 26
        y += 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="740" height="{y}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>\n' + "\n".join(out) + "\n</svg>\n"
    )
