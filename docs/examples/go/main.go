// Command consumer acts on virtbus events from RabbitMQ: consumer URL-FILE GROUP
//
// The file holds the broker's URL: on a command line its password would show in ps.
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

const (
	exchange  = "virtbus.events"
	ioError   = "io.virtbus.domain.io_error.v1"
	resolved  = "io.virtbus.domain.io_error_resolved.v1"
	gap       = "io.virtbus.agent.gap.v1"
	heartbeat = "io.virtbus.agent.heartbeat.v1"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: consumer URL-FILE GROUP")
	}
	url, err := os.ReadFile(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	for wait := time.Second; ; wait = min(2*wait, time.Minute) {
		started := time.Now()
		err := consume(strings.TrimSpace(string(url)), "virtbus."+os.Args[2])
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
		read, d, err := toEvent(delivery)
		if err != nil {
			log.Printf("dead-lettered to %s.dead: %v", queue, err)
			if err := delivery.Reject(false); err != nil {
				return err
			}
			continue
		}
		if err := act(read, d); err != nil {
			return err // unacknowledged: it is delivered again after the reconnect
		}
		if err := delivery.Ack(false); err != nil { // effect first, acknowledge after
			return err
		}
	}
	return fmt.Errorf("the broker closed the channel")
}

// data is what act needs of the events' data.
type data struct {
	Domain *struct{ Name string }
	Error  *struct {
		Action string
		Reason *string
	}
	Reason, Origin string
}

// act is the effect. An event may come twice: do nothing that must not be done twice, or keep (source, id) with it.
// It returns an error only where trying again can help: for that the consumer reconnects, and the event comes again.
func act(e *event.Event, d *data) error {
	switch {
	case d == nil: // another type, or one of a later version: not an error
		fmt.Printf("other %s %s\n", e.ID(), e.Type())
	case d.Origin == "replay": // an alert drill
	case e.Type() == ioError:
		reason := ""
		if d.Error.Reason != nil {
			reason = *d.Error.Reason
		}
		fmt.Printf("error %s %s: %s %s\n", e.ID(), d.Domain.Name, d.Error.Action, reason)
	case e.Type() == resolved:
		fmt.Printf("resolved %s %s\n", e.ID(), d.Domain.Name)
	case e.Type() == heartbeat: // its open incidents, for who starts without a memory
	case e.Type() == gap:
		fmt.Printf("gap %s: %s was blind: %s\n", e.ID(), e.Source(), d.Reason)
	}
	return nil
}

// toData reads the data of the types that act knows, before anything is done: what can't be read never will be.
// Data of other types may be anything.
func toData(e *event.Event) (*data, error) {
	var d *data // null leaves it nil
	switch e.Type() {
	case ioError, resolved, heartbeat, gap:
		if err := json.Unmarshal(e.Data(), &d); err != nil {
			return nil, fmt.Errorf("data of %s: %w", e.Type(), err)
		}
		ofDomain := e.Type() == ioError || e.Type() == resolved
		if d == nil || ofDomain && d.Domain == nil || e.Type() == ioError && d.Error == nil {
			return nil, fmt.Errorf("data of %s lacks what it must have", e.Type())
		}
	}
	return d, nil
}

// toEvent reads a message in binary or in structured mode, and its data.
func toEvent(delivery amqp.Delivery) (*event.Event, *data, error) {
	e, err := toEnvelope(delivery)
	if err != nil {
		return nil, nil, err
	}
	if err := e.Validate(); err != nil { // of the attributes; the SDK does not read the data
		return nil, nil, err
	}
	d, err := toData(e)
	return e, d, err
}

func toEnvelope(delivery amqp.Delivery) (*event.Event, error) {
	e := event.New()
	if strings.HasPrefix(strings.ToLower(delivery.ContentType), "application/cloudevents") {
		if err := json.Unmarshal(delivery.Body, &e); err != nil {
			return nil, err
		}
		return &e, nil
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
	return &e, e.SetData(delivery.ContentType, delivery.Body)
}
