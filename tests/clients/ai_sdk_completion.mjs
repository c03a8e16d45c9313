// The completions API through the AI SDK: a text is continued as it stands.

import assert from 'node:assert/strict';
import { createOpenRouter } from '@openrouter/ai-sdk-provider';
import { generateText, streamText } from 'ai';
import * as dialogue from './dialogue.mjs';

const openrouter = createOpenRouter({ apiKey: dialogue.key, baseURL: dialogue.url });
const order = {
  model: openrouter.completion(dialogue.model),
  prompt: dialogue.question,
  maxOutputTokens: 8,
  temperature: 0,
  maxRetries: 0,
};

const reply = await generateText(order);
assert.ok(reply.text.length > 0);
assert.ok(reply.usage.outputTokens > 0 && reply.usage.outputTokens <= 8);
const streamed = streamText(order);
let text = '';
for await (const part of streamed.textStream) text += part;
assert.equal(text, reply.text);
assert.equal(await streamed.finishReason, reply.finishReason);
