"""Add the Debian packages of the image that the tests built to a CycloneDX file of the Python packages.

python .docker/sbom.py FILE
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[1]


def packages(status: str) -> list[dict[str, object]]:
    """The components of a dpkg status file, as CycloneDX with package URLs."""
    found: list[dict[str, object]] = []
    for block in status.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and line[0] != " ")
        if fields.get("Status") != "install ok installed":
            continue
        name, version = fields["Package"], fields["Version"]
        purl = f"pkg:deb/debian/{quote(name)}@{quote(version, safe='')}?arch={fields['Architecture']}"
        found.append({"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl})
    return found


def main() -> None:
    """Read, add, write; without an image only say so."""
    file = Path(sys.argv[1])
    sys.path.insert(0, str(ROOT))
    from tests.chart import image

    try:
        with image.mounted() as root:
            status = (root / "var/lib/dpkg/status").read_text(encoding="utf-8")
    except (image.ToolMissing, OSError, subprocess.SubprocessError) as error:
        print(f"Python packages only: no image to look into ({str(error).splitlines()[0]})")
        return
    bill = json.loads(file.read_text(encoding="utf-8"))
    added = packages(status)
    bill["components"] = bill.get("components", []) + added
    file.write_text(json.dumps(bill, indent=2) + "\n", encoding="utf-8")
    print(f"{len(bill['components'])} components, of which {len(added)} are Debian packages of the image")


if __name__ == "__main__":
    main()
