// The API through OpenRouter's own client for node.

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
const user = (content) => ({ role: 'user', content });
const send = (chatRequest) =>
  client.chat.send({ chatRequest: { model: dialogue.model, temperature: 0, ...chatRequest } });

async function chat() {
  const reply = await send({ messages: [user(dialogue.question)] });
  const { message, finishReason } = reply.choices[0];
  assert.deepEqual([message.reasoning, message.content], [dialogue.thought, dialogue.answer]);
  assert.equal(message.reasoningDetails[0].text, dialogue.thought);
  assert.equal(finishReason, 'stop');
  assert.ok(reply.usage.completionTokensDetails.reasoningTokens > 0);
  return reply.id;
}

async function stream() {
  let [reasoning, answer] = ['', ''];
  const [finishes, usages] = [[], []];
  for await (const chunk of await send({ messages: [user(dialogue.question)], stream: true })) {
    if (chunk.usage) usages.push(chunk.usage);
    for (const { delta, finishReason } of chunk.choices) {
      reasoning += delta.reasoning ?? '';
      answer += delta.content ?? '';
      if (finishReason) finishes.push(finishReason);
    }
  }
  assert.deepEqual([reasoning, answer], [dialogue.thought, dialogue.answer]);
  assert.deepEqual(finishes, ['stop']);
  assert.equal(usages.length, 1);
}

async function callTools() {
  const tools = Object.entries(dialogue.about).map(([name, description]) => ({
    type: 'function',
    function: { name, description, parameters: dialogue.city },
  }));
  const asked = (await send({ messages: [user(dialogue.weather)], tools })).choices[0];
  const [call] = asked.message.toolCalls;
  assert.equal(asked.message.reasoning, dialogue.callThought);
  assert.equal(call.function.name, 'get_weather');
  assert.deepEqual(JSON.parse(call.function.arguments), dialogue.callArguments);
  assert.equal(asked.finishReason, 'tool_calls');
  const result = {
    role: 'tool',
    toolCallId: call.id,
    content: JSON.stringify(dialogue.result),
  };
  const messages = [user(dialogue.weather), asked.message, result];
  const { message } = (await send({ messages, tools })).choices[0];
  const said = [message.reasoning, message.content];
  assert.deepEqual(said, [dialogue.resultThought, dialogue.resultAnswer]);
}

async function keepASchema() {
  const jsonSchema = { name: 'place', strict: true, schema: dialogue.schema };
  const responseFormat = { type: 'json_schema', jsonSchema };
  const reply = await send({ messages: [user(dialogue.describe)], responseFormat });
  assert.deepEqual(JSON.parse(reply.choices[0].message.content), dialogue.oslo);
}

async function beRefused() {
  await assert.rejects(send({ model: dialogue.nobody, messages: [user(dialogue.question)] }), (error) => {
    assert.ok(error instanceof BadRequestResponseError);
    assert.equal(error.message, dialogue.refusal);
    return true;
  });
}

async function lookAround(generation) {
  const models = (await client.models.list()).result.data;
  assert.ok(models.some(({ id }) => id === dialogue.model));
  assert.equal((await client.models.count()).data.count, models.length);
  const [author, slug] = dialogue.model.split('/');
  assert.equal((await client.models.get({ author, slug })).data.id, dialogue.model);
  const { endpoints } = (await client.endpoints.list({ author, slug })).data;
  assert.ok(endpoints[0].contextLength > 0);
  assert.ok((await client.providers.list()).data.length > 0);
  const told = (await client.generations.getGeneration({ id: generation })).data;
  assert.deepEqual([told.id, told.model], [generation, dialogue.model]);
  const about = (await client.apiKeys.getCurrentKeyMetadata()).data;
  assert.ok(about.label.startsWith('sk-or-v1-'));
  assert.ok((await client.credits.getCredits()).data.totalUsage >= 0);
}

const generation = await chat();
await stream();
await callTools();
await keepASchema();
await beRefused();
await lookAround(generation);
