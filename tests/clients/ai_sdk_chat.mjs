// The chat API through the AI SDK, which runs the tools by itself.

import assert from 'node:assert/strict';
import { createOpenRouter } from '@openrouter/ai-sdk-provider';
import { generateText, jsonSchema, Output, stepCountIs, streamText, tool } from 'ai';
import * as dialogue from './dialogue.mjs';

const openrouter = createOpenRouter({ apiKey: dialogue.key, baseURL: dialogue.url });
const settings = { model: openrouter.chat(dialogue.model), temperature: 0, maxRetries: 0 };

async function chat() {
  const reply = await generateText({ ...settings, prompt: dialogue.question });
  assert.deepEqual([reply.reasoningText, reply.text], [dialogue.thought, dialogue.answer]);
  assert.equal(reply.finishReason, 'stop');
  assert.ok(reply.usage.totalTokens > 0);
  assert.ok(reply.providerMetadata.openrouter.provider.length > 0);
}

async function stream() {
  const reply = streamText({ ...settings, prompt: dialogue.question });
  let [reasoning, answer] = ['', ''];
  for await (const part of reply.fullStream) {
    assert.notEqual(part.type, 'error', part.error);
    if (part.type === 'reasoning-delta') reasoning += part.text;
    if (part.type === 'text-delta') answer += part.text;
  }
  assert.deepEqual([reasoning, answer], [dialogue.thought, dialogue.answer]);
  assert.equal(await reply.finishReason, 'stop');
}

const calls = [];
const tools = Object.fromEntries(
  Object.entries(dialogue.about).map(([name, description]) => [
    name,
    tool({
      description,
      inputSchema: jsonSchema(dialogue.city),
      execute: (input) => {
        calls.push([name, input]);
        return dialogue.result;
      },
    }),
  ]),
);

async function callTools() {
  const asked = { ...settings, prompt: dialogue.weather, tools, stopWhen: stepCountIs(2) };
  const whole = await generateText(asked);
  const streamed = streamText(asked);
  await streamed.consumeStream();
  for (const steps of [whole.steps, await streamed.steps]) {
    const said = steps.map(({ reasoningText, text }) => [reasoningText, text]);
    assert.deepEqual(said, [
      [dialogue.callThought, ''],
      [dialogue.resultThought, dialogue.resultAnswer],
    ]);
    assert.equal(steps[0].finishReason, 'tool-calls');
  }
  const call = ['get_weather', dialogue.callArguments];
  assert.deepEqual(calls, [call, call]);
}

async function keepASchema() {
  const output = Output.object({ name: 'place', schema: jsonSchema(dialogue.schema) });
  const reply = await generateText({ ...settings, prompt: dialogue.describe, output });
  assert.deepEqual(reply.output, dialogue.oslo);
}

await chat();
await stream();
await callTools();
await keepASchema();
