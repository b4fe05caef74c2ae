// Prints an event as the SDK understood it; validate() checks it against the CloudEvents JSON schema.
const CORE = ['id', 'source', 'type', 'specversion', 'subject', 'time', 'dataschema', 'datacontenttype'];

export function show(event) {
  if (event.validate() !== true) throw new Error(`not a valid CloudEvent: ${event.id}`);
  const all = event.toJSON();
  const attributes = Object.fromEntries(CORE.map((name) => [name, all[name]]));
  for (const [name, value] of Object.entries(all)) {
    if (value !== undefined && ![...CORE, 'data', 'data_base64'].includes(name)) attributes[name] = String(value);
  }
  console.log(JSON.stringify({ attributes, data: event.data }));
}
