// Parses an AsyncAPI document: node asyncapi.mjs FILE. Prints what is wrong; ends with 1 on an error.
import { readFileSync } from 'node:fs';
import { Parser } from '@asyncapi/parser';

const { document, diagnostics } = await new Parser().parse(readFileSync(process.argv[2], 'utf8'));
const faults = diagnostics.filter(({ severity }) => severity <= 1); // errors and warnings; hints are no faults
for (const { code, path, message } of faults) console.log(`${code} at ${path.join('/')}: ${message}`);
if (!document || faults.length > 0) process.exit(1);
console.log(`AsyncAPI ${document.version()}, ${document.allMessages().length} messages`);
