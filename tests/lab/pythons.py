"""`make pythons`: `make unit` on the Python of other Debian releases, each in a root file system of its own.

    python -m tests.lab.pythons [SUITE…]

The checkout is mounted into it; what is installed there is kept in .cache.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tests.lab import chroot
from tests.lab.lab import CHECKOUT

SUITES = ("trixie", "forky")
# As in system-packages.txt, and what the tests of no real part call.
PACKAGES = (
    "ca-certificates", "gcc", "git", "libc6-dev", "libvirt-dev", "make", "mount", "openssl", "pkg-config",
    "python3-dev", "python3-venv",
)  # fmt: skip

INSIDE = """\
root=$1 checkout=$2; shift 2
mount --bind "$root" "$root"  # a test takes / for a mount, as it is elsewhere
for each in proc sys dev; do mount --rbind /$each "$root/$each"; done
mount -t tmpfs tests "$root/tmp"
mkdir -p "$root/checkout" "$root/kept"
mount --bind "$checkout" "$root/checkout"
for file in /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do  # the index as this machine reaches it
  test ! -e $file || cp $file "$root$file"
done
exec chroot "$root" "$@"
"""


def main(suites: list[str]) -> int:
    """Run them; 1 when one fails."""
    failed = []
    for suite in suites or SUITES:
        root = chroot.suite_root(suite, PACKAGES)
        inside = "cd /checkout && python3 --version && make unit VENV=/kept/venv PYTHON=python3"
        words = ["unshare", "--mount", "sh", "-euc", INSIDE, "inside", str(root), str(CHECKOUT), "sh", "-euc"]
        clean = {name: os.environ[name] for name in ("PIP_INDEX_URL", "PIP_CERT") if name in os.environ}
        clean |= {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/tmp"}
        print(f"{suite}: ", end="", flush=True)
        if subprocess.run([*words, inside], env=clean, check=False).returncode:
            failed.append(suite)
    print(f"failed: {', '.join(failed)}" if failed else "passed on each")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
