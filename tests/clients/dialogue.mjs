// What the served model knows by heart, and where it is served: dialogue.py for node.

export const { OPENROUTER_API_BASE: url, OPENROUTER_API_KEY: key, OPENROUTER_MODEL: model } =
  process.env;

export const nobody = 'nobody/nothing';
export const refusal = 'nobody/nothing is not a valid model ID';
export const question = 'What is the capital of France?';
export const thought = 'France is a country. I recall Paris.';
export const answer = 'The capital of France is Paris.';

export const describe = 'Describe Oslo as JSON.';
export const schema = {
  type: 'object',
  properties: {
    city: { type: 'string' },
    country: { type: 'string' },
    sea: { type: 'boolean' },
    near: { type: 'array', items: { type: 'string' } },
  },
  required: ['city', 'country', 'sea', 'near'],
  additionalProperties: false,
};
export const oslo = { city: 'Oslo', country: 'Norway', sea: true, near: ['Moss', 'Ski'] };

export const weather = 'How is the weather in Paris?';
export const callThought = 'I ask for the weather in Paris.';
export const callArguments = { city: 'Paris' };
export const result = { sky: 'clear' };
export const resultThought = 'The sky is clear.';
export const resultAnswer = 'The sky over Paris is clear.';

export const city = {
  type: 'object',
  properties: { city: { type: 'string' } },
  required: ['city'],
};
export const about = { get_weather: 'Weather of a city.', get_time: 'Time in a city.' };
