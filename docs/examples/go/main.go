// Command consumer acts on virtbus events from RabbitMQ: consumer amqps://scheduler:SECRET@broker/virtbus go-scheduler
//
// It declares its own queue, acknowledges after the effect, leaves what it can't read to a dead-letter queue, and
// reconnects for ever.
package main

import (
	"encoding/json"
	"fmt"
	"log"
	"os"
	"strings"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	amqp "github.com/rabbitmq/amqp091-go"
)

const exchange = "virtbus.events"

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: consumer URL GROUP")
	}
	for wait := time.Second; ; wait = min(2*wait, time.Minute) {
		started := time.Now()
		err := consume(os.Args[1], "virtbus."+os.Args[2])
		if time.Since(started) > time.Minute {
			wait = time.Second
		}
		log.Printf("%v; reconnecting in %s", err, wait)
		time.Sleep(wait)
	}
}

func consume(url, queue string) error {
	connection, err := amqp.Dial(url)
	if err != nil {
		return err
	}
	defer connection.Close()
	channel, err := connection.Channel()
	if err != nil {
		return err
	}
	// What the agents declare, too: whoever comes first makes it.
	if err := channel.ExchangeDeclare(exchange, "topic", true, false, false, false, nil); err != nil {
		return err
	}
	if _, err := channel.QueueDeclare(queue+".dead", true, false, false, false, amqp.Table{"x-queue-type": "quorum"}); err != nil {
		return err
	}
	// One active consumer keeps the order of a guest's events. RabbitMQ 4: add "x-delivery-limit": -1 (docs/events.md).
	if _, err := channel.QueueDeclare(queue, true, false, false, false, amqp.Table{
		"x-queue-type":              "quorum",
		"x-single-active-consumer":  true,
		"x-dead-letter-exchange":    "",
		"x-dead-letter-routing-key": queue + ".dead",
	}); err != nil {
		return err
	}
	// Everything: what no queue takes comes back to the agents as unroutable.
	if err := channel.QueueBind(queue, "#", exchange, false, nil); err != nil {
		return err
	}
	if err := channel.Qos(16, 0, false); err != nil {
		return err
	}
	deliveries, err := channel.Consume(queue, "", false, false, false, false, nil)
	if err != nil {
		return err
	}
	for delivery := range deliveries {
		read, err := toEvent(delivery)
		if err != nil {
			log.Printf("put aside in %s.dead: %v", queue, err)
			if err := delivery.Reject(false); err != nil {
				return err
			}
			continue
		}
		if err := act(read); err != nil {
			return err // unacknowledged: it is delivered again after the reconnect
		}
		if err := delivery.Ack(false); err != nil { // effect first, acknowledge after
			return err
		}
	}
	return fmt.Errorf("the broker closed the channel")
}

// act is the effect. An event may come twice: do nothing that must not be done twice, or keep (source, id) with it.
func act(e *event.Event) error {
	var data struct {
		Domain         *struct{ Name string }
		Device         *struct{ Target *string }
		Error          *struct{ Action, Reason string }
		Reason, Origin string
	}
	if err := json.Unmarshal(e.Data(), &data); err != nil {
		return err
	}
	switch {
	case data.Origin == "replay": // an alert drill
	case e.Type() == "io.virtbus.domain.io_error.v1" && data.Error != nil && data.Domain != nil:
		fmt.Printf("error %s %s: %s %s\n", e.ID(), data.Domain.Name, data.Error.Action, data.Error.Reason)
	case e.Type() == "io.virtbus.domain.io_error_resolved.v1" && data.Domain != nil:
		fmt.Printf("resolved %s %s\n", e.ID(), data.Domain.Name)
	case e.Type() == "io.virtbus.agent.heartbeat.v1": // its open incidents, for who starts without a memory
	case e.Type() == "io.virtbus.agent.gap.v1":
		fmt.Printf("gap %s: %s was blind: %s\n", e.ID(), e.Source(), data.Reason)
	default: // of a later version: not an error
		fmt.Printf("other %s %s\n", e.ID(), e.Type())
	}
	return nil
}

// toEvent reads a message in binary or in structured mode.
func toEvent(delivery amqp.Delivery) (*event.Event, error) {
	e := event.New()
	if strings.HasPrefix(strings.ToLower(delivery.ContentType), "application/cloudevents") {
		if err := json.Unmarshal(delivery.Body, &e); err != nil {
			return nil, err
		}
		return &e, e.Validate()
	}
	for name, value := range delivery.Headers {
		attribute, is := strings.CutPrefix(name, "ce-")
		if !is {
			continue
		}
		switch text := fmt.Sprint(value); attribute {
		case "specversion":
			e.SetSpecVersion(text)
		case "id":
			e.SetID(text)
		case "source":
			e.SetSource(text)
		case "type":
			e.SetType(text)
		case "subject":
			e.SetSubject(text)
		case "dataschema":
			e.SetDataSchema(text)
		case "time":
			at, err := time.Parse(time.RFC3339Nano, text)
			if err != nil {
				return nil, err
			}
			e.SetTime(at)
		default:
			e.SetExtension(attribute, text)
		}
	}
	if err := e.SetData("application/json", delivery.Body); err != nil {
		return nil, err
	}
	return &e, e.Validate()
}
