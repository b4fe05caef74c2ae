// Command interop reads COUNT messages as CloudEvents with the Go SDK and prints one JSON line an event.
//
//	interop amqp URL QUEUE COUNT | kafka BROKERS TOPIC COUNT
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/IBM/sarama"
	"github.com/cloudevents/sdk-go/v2/binding"
	"github.com/cloudevents/sdk-go/v2/binding/format"
	"github.com/cloudevents/sdk-go/v2/binding/spec"
	"github.com/cloudevents/sdk-go/v2/event"
	amqp "github.com/rabbitmq/amqp091-go"
)

func main() {
	if len(os.Args) != 5 {
		log.Fatal("usage: interop amqp|kafka ADDRESS NAME COUNT")
	}
	count, err := strconv.Atoi(os.Args[4])
	if err == nil {
		read := map[string]func(string, string, int) error{"amqp": readAMQP, "kafka": readKafka}[os.Args[1]]
		err = read(os.Args[2], os.Args[3], count)
	}
	if err != nil {
		log.Fatal(err)
	}
}

func readAMQP(url, queue string, count int) error {
	connection, err := amqp.Dial(url)
	if err != nil {
		return err
	}
	defer connection.Close()
	channel, err := connection.Channel()
	if err != nil {
		return err
	}
	for read := 0; read < count; {
		delivery, ok, err := channel.Get(queue, false)
		if err != nil {
			return err
		}
		if !ok {
			time.Sleep(50 * time.Millisecond)
			continue
		}
		headers := map[string]string{}
		for name, value := range delivery.Headers {
			headers[name] = fmt.Sprint(value)
		}
		// As Knative's receiver does: the content type comes from the header, not from the property.
		if err := show(message{prefix: "ce-", headers: headers, body: delivery.Body}); err != nil {
			return err
		}
		if err := delivery.Ack(false); err != nil {
			return err
		}
		read++
	}
	return nil
}

func readKafka(brokers, topic string, count int) error {
	consumer, err := sarama.NewConsumer(strings.Split(brokers, ","), sarama.NewConfig())
	if err != nil {
		return err
	}
	defer consumer.Close()
	partitions, err := consumer.Partitions(topic)
	if err != nil {
		return err
	}
	records := make(chan *sarama.ConsumerMessage)
	for _, partition := range partitions {
		from, err := consumer.ConsumePartition(topic, partition, sarama.OffsetOldest)
		if err != nil {
			return err
		}
		go func() {
			for record := range from.Messages() {
				records <- record
			}
		}()
	}
	for read := 0; read < count; read++ {
		record := <-records
		headers := map[string]string{}
		for _, header := range record.Headers {
			headers[string(header.Key)] = string(header.Value)
		}
		if err := show(message{prefix: "ce_", headers: headers, body: record.Value}); err != nil {
			return err
		}
	}
	return nil
}

// message lets the SDK read a message of either broker; the SDK decides what it means.
type message struct {
	prefix  string
	headers map[string]string
	body    []byte
}

func (m message) ReadEncoding() binding.Encoding {
	if format.Lookup(m.headers["content-type"]) != nil {
		return binding.EncodingStructured
	}
	return binding.EncodingBinary
}

func (m message) ReadStructured(ctx context.Context, writer binding.StructuredWriter) error {
	if m.ReadEncoding() != binding.EncodingStructured {
		return binding.ErrNotStructured
	}
	return writer.SetStructuredEvent(ctx, format.Lookup(m.headers["content-type"]), bytes.NewReader(m.body))
}

func (m message) ReadBinary(ctx context.Context, writer binding.BinaryWriter) error {
	if m.ReadEncoding() != binding.EncodingBinary {
		return binding.ErrNotBinary
	}
	versions := spec.WithPrefix(m.prefix)
	version := versions.Version(m.headers[m.prefix+"specversion"])
	for name, value := range m.headers {
		var err error
		switch attribute := version.Attribute(name); {
		case name == "content-type":
			err = writer.SetAttribute(version.AttributeFromKind(spec.DataContentType), value)
		case attribute != nil:
			err = writer.SetAttribute(attribute, value)
		case strings.HasPrefix(name, m.prefix):
			err = writer.SetExtension(strings.TrimPrefix(name, m.prefix), value)
		}
		if err != nil {
			return err
		}
	}
	return writer.SetData(bytes.NewReader(m.body))
}

func (m message) GetAttribute(kind spec.Kind) (spec.Attribute, interface{}) {
	version := spec.WithPrefix(m.prefix).Version(m.headers[m.prefix+"specversion"])
	attribute := version.AttributeFromKind(kind)
	name := attribute.PrefixedName()
	if kind == spec.DataContentType {
		name = "content-type"
	}
	return attribute, m.headers[name]
}

func (m message) GetExtension(name string) interface{} { return m.headers[m.prefix+name] }

func (m message) Finish(error) error { return nil }

func show(m message) error {
	read, err := binding.ToEvent(context.Background(), m)
	if err != nil {
		return err
	}
	if err := read.Validate(); err != nil {
		return err
	}
	line, err := json.Marshal(map[string]any{"attributes": attributes(read), "data": json.RawMessage(read.Data())})
	if err != nil {
		return err
	}
	_, err = fmt.Println(string(line))
	return err
}

func attributes(read *event.Event) map[string]string {
	found := map[string]string{
		"specversion":     read.SpecVersion(),
		"id":              read.ID(),
		"source":          read.Source(),
		"type":            read.Type(),
		"subject":         read.Subject(),
		"time":            read.Time().UTC().Format("2006-01-02T15:04:05.000000Z"),
		"dataschema":      read.DataSchema(),
		"datacontenttype": read.DataContentType(),
	}
	for name, value := range read.Extensions() {
		found[name] = fmt.Sprint(value)
	}
	return found
}
