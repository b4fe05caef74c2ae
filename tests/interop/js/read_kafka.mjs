// Reads COUNT records of a Kafka topic from its beginning with kafkajs, as CloudEvents with the JavaScript SDK.
// node read_kafka.mjs BROKERS TOPIC COUNT: one JSON line an event.
import { Kafka, logLevel } from 'kafkajs';
import { Kafka as Binding } from 'cloudevents';
import { show } from './show.mjs';

const [brokers, topic, count] = process.argv.slice(2);
const consumer = new Kafka({ brokers: brokers.split(','), logLevel: logLevel.ERROR }).consumer({
  groupId: `interop-js-${process.pid}`,
});
await consumer.connect();
await consumer.subscribe({ topic, fromBeginning: true });
let read = 0;
await new Promise((resolve, reject) => {
  consumer.run({
    eachMessage: async ({ message }) => {
      if (read >= Number(count)) return;
      try {
        const headers = Object.fromEntries(Object.entries(message.headers).map(([k, v]) => [k, v.toString()]));
        const { key, value, timestamp } = message;
        show(Binding.toEvent({ headers, body: value.toString('utf8'), key: key.toString(), value, timestamp }));
        read += 1;
        if (read === Number(count)) resolve();
      } catch (error) {
        reject(error);
      }
    },
  });
});
await consumer.disconnect();
