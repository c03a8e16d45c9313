"""The completions API through the client of OpenAI: a text is continued as it stands."""

import dialogue
from openai import OpenAI

ORDER = {"model": dialogue.MODEL, "prompt": dialogue.QUESTION, "max_tokens": 8, "temperature": 0}

with OpenAI(api_key=dialogue.KEY, base_url=dialogue.URL, max_retries=0) as client:
    (reply,) = client.completions.create(**ORDER).choices
    assert reply.text
    chunks = [
        choice
        for chunk in client.completions.create(stream=True, **ORDER)
        for choice in chunk.choices
    ]
    assert "".join(chunk.text for chunk in chunks) == reply.text
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [reply.finish_reason]
