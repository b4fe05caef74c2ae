"""Make docs/fleet.svg and docs/dashboard.svg from one run of real parts: `make pictures`.

Takes eight minutes. `--keep FILE` keeps what was seen as JSON, and `--from FILE` draws that again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from tests.pictures import plots, terminal, world
from virtbus import telemetry

DOCS = Path(__file__).resolve().parents[2] / "docs"


def main() -> None:
    """Run, and draw."""
    parser = argparse.ArgumentParser(prog="python -m tests.pictures", description=__doc__)
    parser.add_argument("--keep", type=Path, help="write what was seen into this file")
    parser.add_argument("--from", dest="kept", type=Path, help="draw this file again, without a run")
    options = parser.parse_args()
    telemetry.configure(level="error")
    seen = world.Seen(**json.loads(options.kept.read_text())) if options.kept else world.run()
    if options.keep:
        options.keep.write_text(json.dumps(asdict(seen)))
    (DOCS / "fleet.svg").write_text(terminal.picture(seen.fleet, title="virtbus fleet"))
    (DOCS / "dashboard.svg").write_text(plots.picture(seen))


if __name__ == "__main__":
    main()
