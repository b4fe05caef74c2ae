"""Where `virtbus` and `python -m virtbus` begin: before the imports, which an interrupt may meet too."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and exit; 130 for an interrupt, also of the imports that it takes."""
    try:
        from virtbus.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
