"""oslo.messaging's notifier (rabbit, messagingv2): oslo_peer.py RABBIT-URL MESSAGES.json"""

import json
import sys
import time
from pathlib import Path

import oslo_messaging
from oslo_config import cfg

url, file = sys.argv[1:]
messages = json.loads(Path(file).read_text())
transport = oslo_messaging.get_notification_transport(
    cfg.ConfigOpts(), url=url.replace("amqp://", "rabbit://")
)
notifier = oslo_messaging.Notifier(
    transport, driver="messagingv2", topics=["bench_oslo"], publisher_id="compute.host", retry=3
)
notifier.info({}, "virtbus.bench", messages[0]["payload"])
begun = time.perf_counter()
for message in messages:
    notifier.info({}, message["type"], message["payload"])
print(json.dumps({"count": len(messages), "seconds": time.perf_counter() - begun}))
