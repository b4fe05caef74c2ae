// Checks structured events (JSON lines on standard input) against the CloudEvents JSON format schema of the SDK.
// One line an event: "valid", or what is wrong.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';

const require = createRequire(import.meta.url);
const validate = require(join(dirname(require.resolve('cloudevents')), 'schema', 'v1.js'));
for (const line of readFileSync(0, 'utf8').trim().split('\n')) {
  const valid = validate(JSON.parse(line));
  console.log(valid ? 'valid' : validate.errors.map(({ instancePath, message }) => `${instancePath} ${message}`).join('; '));
}
