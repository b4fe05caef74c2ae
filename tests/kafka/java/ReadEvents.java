import io.cloudevents.CloudEvent;
import io.cloudevents.kafka.CloudEventDeserializer;
import java.time.Duration;
import java.util.Collection;
import java.util.List;
import java.util.Properties;
import java.util.TreeSet;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.serialization.StringDeserializer;
import org.apache.kafka.common.utils.Utils;

/**
 * Reads a topic with the CloudEvents Java SDK and prints each event as tab-separated name=value pairs:
 * ReadEvents BOOTSTRAP TOPIC COUNT
 */
class ReadEvents {
    public static void main(String[] arguments) {
        Properties settings = new Properties();
        settings.put("bootstrap.servers", arguments[0]);
        settings.put("auto.offset.reset", "earliest");
        settings.put("enable.auto.commit", "false");
        int left = Integer.parseInt(arguments[2]);
        long limit = System.nanoTime() + Duration.ofSeconds(30).toNanos();
        try (KafkaConsumer<String, CloudEvent> consumer =
                new KafkaConsumer<>(settings, new StringDeserializer(), new CloudEventDeserializer())) {
            List<TopicPartition> places = consumer.partitionsFor(arguments[1]).stream()
                    .map(place -> new TopicPartition(place.topic(), place.partition()))
                    .toList();
            consumer.assign(places);
            consumer.seekToBeginning(places);
            while (left > 0 && System.nanoTime() < limit) {
                for (ConsumerRecord<String, CloudEvent> record : consumer.poll(Duration.ofMillis(200))) {
                    print(record, places);
                    left--;
                }
            }
        }
        System.exit(left == 0 ? 0 : 1);
    }

    private static void print(ConsumerRecord<String, CloudEvent> record, Collection<TopicPartition> places) {
        CloudEvent event = record.value();
        byte[] key = record.key().getBytes(java.nio.charset.StandardCharsets.UTF_8);
        StringBuilder line = new StringBuilder("EVENT\tkey=" + record.key());
        // Where Java's own partitioner would have put this key.
        boolean agrees = Utils.toPositive(Utils.murmur2(key)) % places.size() == record.partition();
        line.append("\tjava_partition_agrees=").append(agrees);
        for (String name : new TreeSet<>(event.getAttributeNames())) {
            line.append('\t').append(name).append('=').append(event.getAttribute(name));
        }
        for (String name : new TreeSet<>(event.getExtensionNames())) {
            line.append('\t').append(name).append('=').append(event.getExtension(name));
        }
        String data = new String(event.getData().toBytes(), java.nio.charset.StandardCharsets.UTF_8);
        System.out.println(line.append("\tdata=").append(data));
    }
}
