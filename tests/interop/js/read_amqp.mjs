// Reads COUNT messages of a RabbitMQ queue with amqplib, as CloudEvents with the JavaScript SDK.
// node read_amqp.mjs URL QUEUE COUNT: one JSON line an event.
import amqp from 'amqplib';
import { HTTP } from 'cloudevents';
import { show } from './show.mjs';

const [url, queue, count] = process.argv.slice(2);
const connection = await amqp.connect(url);
const channel = await connection.createChannel();
for (let read = 0; read < Number(count); ) {
  const message = await channel.get(queue);
  if (!message) {
    await new Promise((resolve) => setTimeout(resolve, 50));
    continue;
  }
  // The SDK has no reader for AMQP 0-9-1; its HTTP reader takes the same headers.
  const headers = message.properties.headers;
  show(HTTP.toEvent({ headers, body: message.content.toString('utf8') }));
  channel.ack(message);
  read += 1;
}
await channel.close();
await connection.close();
