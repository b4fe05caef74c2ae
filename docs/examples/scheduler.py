"""A scheduler in forty lines: it places guests on the healthiest host, by what the bus tells.

python scheduler.py URL-FILE web-1 web-2 db-1     (a URL in a flag shows its password in ps)
"""

import sys
import threading
from pathlib import Path

from virtbus import Consumer
from virtbus.fleet import Blame, Fleet
from virtbus.model import Clock

PENALTY = {Blame.NONE: 0, Blame.BACKEND: 1, Blame.UNDETERMINED: 2, Blame.HOST: 100}


class Scheduler:
    def __init__(self, url: str) -> None:
        self.fleet, self.clock, self.lock = Fleet(), Clock(), threading.Lock()
        self.placed: dict[str, str] = {}  # guest → host
        self.consumer = Consumer(url)  # without a group: everything from now on
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        for delivery in self.consumer:
            if delivery.event is not None:
                with self.lock:
                    self.fleet.saw(delivery.event, delivery.attributes, self.clock())
            delivery.ack()

    def place(self, guest: str) -> str:
        with self.lock:
            hosts = [host for host in self.fleet.view(self.clock()).hosts if host.state == "observing"]
        if not hosts:
            raise RuntimeError("no host is heard: wait for one round of heartbeats")
        load = list(self.placed.values())
        best = min(hosts, key=lambda host: (PENALTY[host.blame], load.count(host.name), host.name))
        self.placed[guest] = best.name
        return best.name


if __name__ == "__main__":
    scheduler = Scheduler(Path(sys.argv[1]).read_text().strip())
    threading.Event().wait(65)  # one round of heartbeats
    for name in sys.argv[2:]:
        print(name, "→", scheduler.place(name))
