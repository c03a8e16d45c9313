"""One model of a server, asked for replies."""

from typing import Any

from pipeline.serve.probes.client import Body, Client
from pipeline.serve.probes.declared import Declared
from pipeline.serve.probes.reply import Reply, read_reply
from pipeline.serve.probes.seen import Fault
from pipeline.serve.probes.stream import Stream, read_stream

QUESTION = "What is the capital of France?"
"""One that a model answers alike again and again."""
_MAX_TOKENS = 64


class Subject:
    """Requests have the likeliest tokens, no thought and a bound, unless they say otherwise."""

    def __init__(self, client: Client, declared: Declared) -> None:
        self.client = client
        self.declared = declared

    def has(self, parameter: str) -> bool:
        """Whether the server declares it."""
        return parameter in self.declared.parameters

    def body(self, **fields: Any) -> Body:
        """A request; a field that is None is left out."""
        body: Body = {
            "model": self.declared.model,
            "messages": [{"role": "user", "content": QUESTION}],
            "temperature": 0,
            "max_tokens": _MAX_TOKENS,
        }
        if self.has("reasoning"):
            body["reasoning"] = {"enabled": False}
        if self.has("seed"):
            body["seed"] = 0  # without one, engines may round a prompt that they know differently
        return {key: value for key, value in (body | fields).items() if value is not None}

    async def ask(self, **fields: Any) -> Reply:
        """A reply that comes whole; Fault if it is refused."""
        answer = await self.client.post(self.body(**fields))
        if answer.status != 200:
            raise Fault(f"status {answer.status}: {answer.error()}")
        return read_reply(answer.json())

    async def ask_stream(self, **fields: Any) -> Stream:
        """The same as it comes."""
        async with self.client.open(self.body(stream=True, **fields)) as response:
            if response.status != 200:
                raise Fault(f"status {response.status} for a stream")
            stream = await read_stream(response)
        if not stream.frames:
            raise Fault("a stream has no frames")
        return stream

    async def text(self, **fields: Any) -> str:
        """Of a reply."""
        return (await self.ask(**fields)).first.text
