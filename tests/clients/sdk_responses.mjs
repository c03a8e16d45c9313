// The responses API through OpenRouter's own client for node.

import assert from 'node:assert/strict';
import { OpenRouter } from '@openrouter/sdk';
import { BadRequestResponseError } from '@openrouter/sdk/models/errors';
import * as dialogue from './dialogue.mjs';

// By default it asks again for an hour where the server fails.
const client = new OpenRouter({
  apiKey: dialogue.key,
  serverURL: dialogue.url,
  retryConfig: { strategy: 'none' },
});
const send = (responsesRequest) =>
  client.responses.send({
    responsesRequest: { model: dialogue.model, temperature: 0, ...responsesRequest },
  });
const textOf = ({ output }, kind) =>
  output
    .filter(({ type }) => type === kind)
    .flatMap(({ content }) => content.map(({ text }) => text))
    .join('');
const saidBy = (reply) => [textOf(reply, 'reasoning'), textOf(reply, 'message')];

async function respond() {
  const reply = await send({ input: dialogue.question });
  assert.equal(reply.status, 'completed');
  assert.deepEqual(saidBy(reply), [dialogue.thought, dialogue.answer]);
  assert.ok(reply.usage.outputTokensDetails.reasoningTokens > 0);
}

async function stream() {
  let [thought, answer, last] = ['', '', null];
  for await (const event of await send({ input: dialogue.question, stream: true })) {
    if (event.type === 'response.reasoning_text.delta') thought += event.delta;
    if (event.type === 'response.output_text.delta') answer += event.delta;
    last = event;
  }
  assert.deepEqual([thought, answer], [dialogue.thought, dialogue.answer]);
  assert.equal(last.type, 'response.completed');
  assert.deepEqual(saidBy(last.response), [dialogue.thought, dialogue.answer]);
}

async function callTools() {
  const tools = Object.entries(dialogue.about).map(([name, description]) => ({
    type: 'function',
    name,
    description,
    parameters: dialogue.city,
  }));
  const question = { type: 'message', role: 'user', content: dialogue.weather };
  const asked = await send({ input: [question], tools });
  const call = asked.output.at(-1);
  assert.deepEqual(saidBy(asked), [dialogue.callThought, '']);
  assert.deepEqual([call.type, call.name], ['function_call', 'get_weather']);
  assert.deepEqual(JSON.parse(call.arguments), dialogue.callArguments);
  const result = {
    type: 'function_call_output',
    callId: call.callId,
    output: JSON.stringify(dialogue.result),
  };
  const told = await send({ input: [question, ...asked.output, result], tools });
  assert.deepEqual(saidBy(told), [dialogue.resultThought, dialogue.resultAnswer]);
}

async function keepASchema() {
  const format = { type: 'json_schema', name: 'place', strict: true, schema: dialogue.schema };
  const reply = await send({ input: dialogue.describe, text: { format } });
  assert.deepEqual(JSON.parse(textOf(reply, 'message')), dialogue.oslo);
}

async function beRefused() {
  await assert.rejects(send({ model: dialogue.nobody, input: dialogue.question }), (error) => {
    assert.ok(error instanceof BadRequestResponseError);
    assert.equal(error.message, dialogue.refusal);
    return true;
  });
}

await respond();
await stream();
await callTools();
await keepASchema();
await beRefused();
