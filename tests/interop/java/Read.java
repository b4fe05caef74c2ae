import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ObjectNode;
import com.rabbitmq.client.AMQP;
import com.rabbitmq.client.Channel;
import com.rabbitmq.client.Connection;
import com.rabbitmq.client.ConnectionFactory;
import com.rabbitmq.client.GetResponse;
import io.cloudevents.CloudEvent;
import io.cloudevents.SpecVersion;
import io.cloudevents.core.data.BytesCloudEventData;
import io.cloudevents.core.message.MessageReader;
import io.cloudevents.core.message.impl.BaseGenericBinaryMessageReaderImpl;
import io.cloudevents.core.message.impl.GenericStructuredMessageReader;
import io.cloudevents.core.message.impl.MessageUtils;
import io.cloudevents.kafka.CloudEventDeserializer;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.Properties;
import java.util.UUID;
import java.util.function.BiConsumer;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.common.serialization.StringDeserializer;

/**
 * Reads COUNT messages as CloudEvents with the Java SDK and prints one JSON line an event.
 *
 * <p>java Read.java amqp URL QUEUE COUNT | kafka BROKERS TOPIC COUNT
 */
public class Read {
  private static final ObjectMapper JSON = new ObjectMapper();

  public static void main(String[] arguments) throws Exception {
    int count = Integer.parseInt(arguments[3]);
    if (arguments[0].equals("amqp")) {
      amqp(arguments[1], arguments[2], count);
    } else {
      kafka(arguments[1], arguments[2], count);
    }
  }

  private static void amqp(String url, String queue, int count) throws Exception {
    ConnectionFactory factory = new ConnectionFactory();
    factory.setUri(url);
    try (Connection connection = factory.newConnection();
        Channel channel = connection.createChannel()) {
      for (int read = 0; read < count; ) {
        GetResponse got = channel.basicGet(queue, false);
        if (got == null) {
          Thread.sleep(50);
          continue;
        }
        show(reader(got.getProps(), got.getBody()).toEvent());
        channel.basicAck(got.getEnvelope().getDeliveryTag(), false);
        read++;
      }
    }
  }

  /** The SDK decides the mode by the content type, and reads the headers through this. */
  private static MessageReader reader(AMQP.BasicProperties properties, byte[] body) {
    Map<String, Object> headers = properties.getHeaders();
    return MessageUtils.parseStructuredOrBinaryMessage(
        properties::getContentType,
        format -> new GenericStructuredMessageReader(format, body),
        () -> headers.get("ce-specversion").toString(),
        version -> new Headers(version, properties.getContentType(), headers, body));
  }

  private static final class Headers extends BaseGenericBinaryMessageReaderImpl<String, Object> {
    private final String contentType;
    private final Map<String, Object> headers;

    Headers(SpecVersion version, String contentType, Map<String, Object> headers, byte[] body) {
      super(version, BytesCloudEventData.wrap(body));
      this.contentType = contentType;
      this.headers = headers;
    }

    @Override
    protected boolean isContentTypeHeader(String key) {
      return key.equals("content-type");
    }

    @Override
    protected boolean isCloudEventsHeader(String key) {
      return key.startsWith("ce-");
    }

    @Override
    protected String toCloudEventsKey(String key) {
      return key.substring(3);
    }

    @Override
    protected void forEachHeader(BiConsumer<String, Object> each) {
      headers.forEach((key, value) -> each.accept(key, key.equals("content-type") ? contentType : value));
    }

    @Override
    protected String toCloudEventsValue(Object value) {
      return value.toString();
    }
  }

  private static void kafka(String brokers, String topic, int count) throws Exception {
    Properties settings = new Properties();
    settings.put("bootstrap.servers", brokers);
    settings.put("group.id", "interop-java-" + UUID.randomUUID());
    settings.put("auto.offset.reset", "earliest");
    int read = 0;
    try (KafkaConsumer<String, CloudEvent> consumer =
        new KafkaConsumer<>(settings, new StringDeserializer(), new CloudEventDeserializer())) {
      consumer.subscribe(List.of(topic));
      while (read < count) {
        for (ConsumerRecord<String, CloudEvent> got : consumer.poll(Duration.ofMillis(200))) {
          if (!got.key().equals(got.value().getExtension("partitionkey"))) {
            throw new IllegalStateException("key and partitionkey differ: " + got.key());
          }
          show(got.value());
          read++;
        }
      }
    }
  }

  private static void show(CloudEvent event) throws Exception {
    ObjectNode attributes = JSON.createObjectNode();
    for (String name : event.getAttributeNames()) {
      attributes.put(name, event.getAttribute(name).toString());
    }
    for (String name : event.getExtensionNames()) {
      attributes.put(name, event.getExtension(name).toString());
    }
    ObjectNode shown = JSON.createObjectNode();
    shown.set("attributes", attributes);
    shown.set("data", JSON.readTree(event.getData().toBytes()));
    System.out.write((JSON.writeValueAsString(shown) + "\n").getBytes(StandardCharsets.UTF_8));
    System.out.flush();
  }
}
