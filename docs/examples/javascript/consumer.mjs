// Acts on virtbus events from RabbitMQ: node consumer.mjs amqps://scheduler:SECRET@broker/virtbus js-scheduler
//
// It declares its own queue, acknowledges after the effect, leaves what it can't read to a dead-letter queue, and
// reconnects for ever.
import amqp from 'amqplib';
import { HTTP } from 'cloudevents';

const EXCHANGE = 'virtbus.events';
const [url, group] = process.argv.slice(2);
if (!url || !group) {
  console.error('usage: node consumer.mjs URL GROUP');
  process.exit(64);
}

// The effect. An event may come twice: do nothing that must not be done twice, or keep (source, id) with it.
async function act(event) {
  const { data } = event;
  if (data.origin === 'replay') return; // an alert drill
  switch (event.type) {
    case 'io.virtbus.domain.io_error.v1':
      console.log(`error ${event.id} ${data.domain.name}: ${data.error.action} ${data.error.reason ?? ''}`);
      break;
    case 'io.virtbus.domain.io_error_resolved.v1':
      console.log(`resolved ${event.id} ${data.domain.name}`);
      break;
    case 'io.virtbus.agent.heartbeat.v1': // its open incidents, for who starts without a memory
      break;
    case 'io.virtbus.agent.gap.v1':
      console.log(`gap ${event.id}: ${event.source} was blind: ${data.reason}`);
      break;
    default: // of a later version: not an error
      console.log(`other ${event.id} ${event.type}`);
  }
}

async function consume() {
  const queue = `virtbus.${group}`;
  const connection = await amqp.connect(url);
  const ended = new Promise((_, reject) => {
    connection.on('error', reject);
    connection.on('close', () => reject(new Error('the connection closed')));
  });
  ended.catch(() => {});
  const channel = await connection.createChannel();
  channel.on('error', () => connection.close().catch(() => {}));
  // What the agents declare, too: whoever comes first makes it.
  await channel.assertExchange(EXCHANGE, 'topic', { durable: true });
  await channel.assertQueue(`${queue}.dead`, { arguments: { 'x-queue-type': 'quorum' } });
  // One active consumer keeps the order of a guest's events. RabbitMQ 4: add 'x-delivery-limit': -1 (docs/events.md).
  await channel.assertQueue(queue, {
    arguments: { 'x-queue-type': 'quorum', 'x-single-active-consumer': true },
    deadLetterExchange: '',
    deadLetterRoutingKey: `${queue}.dead`,
  });
  await channel.bindQueue(queue, EXCHANGE, '#'); // what no queue takes comes back to the agents as unroutable
  await channel.prefetch(16);
  let last = Promise.resolve(); // one after the other, in order
  await channel.consume(queue, (message) => {
    last = last.then(async () => {
      if (!message) return connection.close();
      let event;
      try {
        // The SDK has no reader for AMQP 0-9-1; its HTTP reader takes the same headers, binary and structured.
        event = HTTP.toEvent({ headers: message.properties.headers, body: message.content.toString('utf8') });
        event.validate();
      } catch (error) {
        console.error(`put aside in ${queue}.dead: ${error.message}`);
        return channel.reject(message, false);
      }
      await act(event);
      channel.ack(message); // effect first, acknowledge after
    });
    last.catch(() => connection.close().catch(() => {})); // unacknowledged: it is delivered again
  });
  return ended;
}

for (let wait = 1; ; wait = Math.min(2 * wait, 60)) {
  const started = Date.now();
  await consume().catch((error) => console.error(`${error.message}; reconnecting in ${wait} s`));
  if (Date.now() - started > 60_000) wait = 1;
  await new Promise((resolve) => setTimeout(resolve, wait * 1000));
}
