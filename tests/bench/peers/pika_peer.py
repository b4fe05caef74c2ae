"""pika's blocking connection with publisher confirms: pika_peer.py AMQP-URL EXCHANGE MESSAGES.json"""

import json
import sys
import time
from pathlib import Path

import pika

url, exchange, file = sys.argv[1:]
messages = json.loads(Path(file).read_text())
channel = pika.BlockingConnection(pika.URLParameters(url)).channel()
channel.confirm_delivery()
begun = time.perf_counter()
for message in messages:
    channel.basic_publish(
        exchange, message["key"], message["body"].encode(),
        pika.BasicProperties(content_type="application/json", headers=message["headers"], delivery_mode=2),
        mandatory=True,
    )  # fmt: skip
print(json.dumps({"count": len(messages), "seconds": time.perf_counter() - begun}))
