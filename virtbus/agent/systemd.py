"""Reports the service's state to systemd: sd_notify(3) in plain lines, nothing where there is no systemd."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping


class Systemd:
    """The service manager behind $NOTIFY_SOCKET; every call is without effect when there is none."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        """Read $NOTIFY_SOCKET, $WATCHDOG_USEC and $WATCHDOG_PID."""
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        meant = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usec = environment.get("WATCHDOG_USEC", "")
        # sd_watchdog_enabled(3) recommends half of the time.
        self.watchdog_seconds = int(usec) / 2e6 if meant and usec.isdecimal() and int(usec) else None

    def tell(self, **states: str | int) -> bool:
        """Send assignments such as READY=1, STATUS="…"; whether somebody was there to take them."""
        if not self._address:
            return False
        lines = "\n".join(f"{name}={' '.join(str(value).splitlines()[:1])}" for name, value in states.items())
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.setblocking(False)  # a service manager that hangs must not hang the agent
            try:
                sender.sendto(lines.encode(), self._address)
            except OSError:
                return False
        return True

    def reloading(self) -> None:
        """Say that a reload begins (Type=notify-reload wants the time); READY=1 ends it."""
        self.tell(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)
