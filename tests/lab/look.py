"""What the libvirt source sees in one look, as JSON: run inside a lab, where the images' paths are real.

python look.py URI     # prints {"domains": [...], "findings": [...]}
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from virtbus import telemetry
from virtbus.sources import SourceOptions
from virtbus.sources.libvirt import LibvirtSource


def main(uri: str, user: int | None) -> None:
    telemetry.configure(level="warning")
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    # Nothing waits for this look, so it need not give up a slow answer.
    ready = LibvirtSource(uri, options=SourceOptions(lookup_deadline_seconds=60.0)).snapshot()
    found = [
        {
            "alias": burst.raw.alias,
            "reason": burst.raw.reason,
            "evidence": {item.check: item.verdict for item in burst.evidence},
        }
        for burst in ready.findings
    ]
    domains = [{"name": domain.name, "state": domain.state} for domain in ready.domains]
    print(json.dumps({"host": asdict(ready.host), "domains": domains, "findings": found}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
