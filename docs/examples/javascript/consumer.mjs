// Acts on virtbus events from RabbitMQ: node consumer.mjs URL-FILE GROUP
//
// The file holds the broker's URL: on a command line its password would show in ps.
//
// It declares its own queue, acknowledges after the effect, leaves what it can't read to a dead-letter queue, and
// reconnects for ever.
import { readFileSync } from 'node:fs';
import amqp from 'amqplib';
import { HTTP } from 'cloudevents';

const EXCHANGE = 'virtbus.events';
const [file, group] = process.argv.slice(2);
if (!file || !group) {
  console.error('usage: node consumer.mjs URL-FILE GROUP');
  process.exit(64);
}
const url = readFileSync(file, 'utf8').trim();

// What the data of each type that `act` knows must have. Data of other types may be anything.
const NEEDED = {
  'io.virtbus.domain.io_error.v1': ['domain', 'error'],
  'io.virtbus.domain.io_error_resolved.v1': ['domain'],
  'io.virtbus.agent.heartbeat.v1': [],
  'io.virtbus.agent.gap.v1': [],
};

// Reads a message before anything is done with it: what can't be read never will be.
function read({ properties, content }) {
  // The SDK has no reader for AMQP 0-9-1; its HTTP reader takes the same headers, binary and structured.
  const headers = { 'content-type': properties.contentType, ...properties.headers };
  const event = HTTP.toEvent({ headers, body: content.toString('utf8') });
  event.validate(); // of the attributes
  const isObject = (value) => typeof value === 'object' && value !== null && !Array.isArray(value);
  const { data, type } = event;
  if (type in NEEDED && !(isObject(data) && NEEDED[type].every((name) => isObject(data[name])))) {
    throw new Error(`data of ${type} lacks what it must have`);
  }
  return event;
}

// The effect. An event may come twice: do nothing that must not be done twice, or keep (source, id) with it.
async function act(event) {
  const { data } = event;
  if (event.type in NEEDED && data.origin === 'replay') return; // an alert drill
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
    default: // another type, or one of a later version: not an error
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
        event = read(message);
      } catch (error) {
        console.error(`dead-lettered to ${queue}.dead: ${error.message}`);
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
