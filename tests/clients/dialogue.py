"""What the served model knows by heart, and where it is served: the same for every client."""

import os
from typing import Any

URL = os.environ["OPENROUTER_API_BASE"]
KEY = os.environ["OPENROUTER_API_KEY"]
MODEL = os.environ["OPENROUTER_MODEL"]
AUTHOR, SLUG = MODEL.split("/")

NOBODY, REFUSAL = "nobody/nothing", "nobody/nothing is not a valid model ID"
QUESTION = "What is the capital of France?"
THOUGHT = "France is a country. I recall Paris."
ANSWER = "The capital of France is Paris."

DESCRIBE = "Describe Oslo as JSON."
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "country": {"type": "string"},
        "sea": {"type": "boolean"},
        "near": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["city", "country", "sea", "near"],
    "additionalProperties": False,
}
OSLO = {"city": "Oslo", "country": "Norway", "sea": True, "near": ["Moss", "Ski"]}

WEATHER = "How is the weather in Paris?"
CALL_THOUGHT = "I ask for the weather in Paris."
ARGUMENTS = {"city": "Paris"}
RESULT = '{"sky": "clear"}'
RESULT_THOUGHT = "The sky is clear."
RESULT_ANSWER = "The sky over Paris is clear."
"""To RESULT, and only where CALL_THOUGHT was handed back with the call."""

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
ABOUT = {"get_weather": "Weather of a city.", "get_time": "Time in a city."}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": text, "parameters": CITY}}
    for name, text in ABOUT.items()
]
"""The model was taught with these very tools: it has no use for others."""


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]
