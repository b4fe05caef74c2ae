"""Process 1 of a lab: builds its private file system view, reaps what dies in it, and ends it.

Started as ``unshare --mount --pid --net --uts --fork --kill-child python init.py FOLDER [ROOT [HOSTNAME]]``.
Guarantees:

1. Every process of the lab lives in its PID namespace: when this process ends, for whatever reason, the
   kernel kills them all.
2. It ends when its standard input closes, so also when the test process was killed with SIGKILL.
3. Nothing that libvirtd writes reaches the machine: /run, /var/lib, /var/cache, /var/log and /etc/libvirt
   are the lab's own, kept in FOLDER, which is removed at the end.

It says ``ready`` when the namespaces stand. Then each line on standard input is a JSON object with ``argv``
and ``log`` (a file's path): that command is started as its child, and the answer is a line with ``pid``, as
this namespace numbers it, or ``error``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

# Debian's and Ubuntu's libvirt refuse to start the QEMU driver where this user is unknown, and only the
# package libvirt-daemon-system makes it. The lab's guests run as root; the name just has to exist.
QEMU_USER = "libvirt-qemu"
# Who runs session daemons (107 is KubeVirt's): libvirt asks for the name of its own user.
SESSION_USER = ("lab-session", 107)

SETUP = """
mount --make-rprivate /
mount -t proc proc "$root/proc"
# No control groups: libvirt would make some for each guest, on the machine's own tree.
umount -l -R /sys/fs/cgroup 2>/dev/null || true
for dir in /run /var/lib /var/cache /var/log; do
  mount -t tmpfs -o mode=755 lab "$root$dir"
  mkdir "$root$dir/libvirt"
done
mount --bind "$folder/run" "$root/run/libvirt"
mount --bind "$folder/lib" "$root/var/lib/libvirt"
mount --bind "$folder/cache" "$root/var/cache/libvirt"
mount --bind "$folder/log" "$root/var/log/libvirt"
mount --bind "$folder/etc" "$root/etc/libvirt"
for file in passwd group; do
  if [ -e "$folder/$file" ]; then mount --bind "$folder/$file" "$root/etc/$file"; fi
done
"""

# A root of its own (another release of the distribution): it also needs devices, and the lab's folder
# under the same path as outside, because libvirt and QEMU are told paths.
SETUP_ROOT = """
mount --bind "$root" "$root"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t tmpfs lab "$root/tmp"
mkdir -p "$root$folder"
mount --bind "$folder" "$root$folder"
mkdir -p "$root/etc/libvirt"
"""


def reap() -> None:
    """Collect what has ended, also what was re-parented to us: libvirt waits 40 s for a zombie QEMU."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def start(order: dict[str, Any], root: str) -> dict[str, Any]:
    argv = order["argv"] if not root else ["chroot", root, *order["argv"]]
    try:
        with Path(order["log"]).open("ab") as log:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
    except OSError as error:
        return {"error": f"{argv[0]}: {error}"}
    return {"pid": process.pid}


def main(folder: Path, root: str = "", hostname: str = "") -> None:
    if os.getpid() != 1:
        sys.exit("init.py: not process 1 of a PID namespace; it would kill everything it can see")
    if hostname:
        socket.sethostname(hostname)
    user, number = SESSION_USER
    for name, lines in (
        ("passwd", {QEMU_USER: "x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin",
                    user: f"x:{number}:{number}::/:/usr/sbin/nologin"}),
        ("group", {QEMU_USER: "x:64055:", user: f"x:{number}:"}),
    ):  # fmt: skip
        known = Path(f"{root}/etc/{name}").read_text()
        missing = "".join(f"{who}:{rest}\n" for who, rest in lines.items() if f"\n{who}:" not in known)
        (folder / name).write_text(known + missing)
    script = SETUP if not root else SETUP_ROOT + SETUP
    subprocess.run(
        ["sh", "-euc", script], check=True, env={**os.environ, "folder": str(folder), "root": root}
    )
    signal.signal(signal.SIGCHLD, lambda *_: reap())
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(start(json.loads(line), root)), flush=True)
    os.kill(-1, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
