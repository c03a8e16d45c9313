"""What each route is for: the part of the API's description that no model of a body says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from pipeline.serve.api.listing import ModelsQuery
from pipeline.serve.api.managing import KeysQuery
from pipeline.serve.asking.request import ChatRequest
from pipeline.serve.books.allowance import KeyChange, NewKey
from pipeline.serve.openapi import account, answers, catalogue, errors
from pipeline.serve.skins.completions import CompletionsRequest
from pipeline.serve.skins.messages_request import MessagesRequest
from pipeline.serve.skins.responses import ResponsesRequest

_SAY_HELLO = {"messages": [{"role": "user", "content": "Say hello."}]}


class EmbeddingsRequest(BaseModel):
    """What is read of it before it is refused."""

    model: str | None = None


@dataclass(frozen=True)
class Ask:
    """A body that a route reads."""

    name: str
    models: Mapping[str, type[BaseModel]]
    """By a word before the names of their parts; a field is the first one's that has it."""
    example: Mapping[str, Any]
    without: tuple[str, ...] = ()
    """Fields of these models that are refused here."""
    needs: tuple[str, ...] = ()
    """One of these fields, beside those that the models cannot do without."""


@dataclass(frozen=True)
class Operation:
    """One method of one path."""

    group: str
    summary: str
    answer: type[BaseModel] | None
    """None is never answered, only refused."""
    refusals: tuple[int, ...] = ()
    """Statuses beside that of success."""
    query: type[BaseModel] | Mapping[str, str] | None = None
    """What may follow the question mark: a model, or texts that say what each key is."""
    ask: Ask | None = None
    event: type[BaseModel] | None = None
    """An event of the answer, where it may be a stream."""
    refusal: type[BaseModel] = errors.ErrorAnswer
    needs_key: bool = False
    content_type: str = "application/json"
    status: int = 200
    """Of success."""


_INFER, _MODELS, _KEY, _SERVER = "Replies", "Models", "Your key and its use", "This server"
_MANAGING = "Keys, for who holds a management key"
_REFUSED_REPLIES = (400, 401, 402, 403, 404, 413, 415, 429, 500, 502, 503)
_ID = {"id": "Of a generation, as its reply had it. Required."}


def _infer(
    summary: str,
    ask: Ask,
    answer: type[BaseModel],
    event: type[BaseModel],
    refusal: type[BaseModel] = errors.ErrorAnswer,
) -> Operation:
    return Operation(
        _INFER,
        summary,
        answer,
        _REFUSED_REPLIES,
        ask=ask,
        event=event,
        refusal=refusal,
        needs_key=True,
    )


def _told(
    summary: str, answer: type[BaseModel], refusals: tuple[int, ...] = (), **others: Any
) -> Operation:
    return Operation(_MODELS, summary, answer, refusals, **others)


def _of_key(
    summary: str, answer: type[BaseModel] | None, *refusals: int, **query: str
) -> Operation:
    return Operation(_KEY, summary, answer, (401, *refusals), query=query, needs_key=True)


def _managed(summary: str, answer: type[BaseModel], *refusals: int, **others: Any) -> Operation:
    return Operation(_MANAGING, summary, answer, (401, 403, *refusals), needs_key=True, **others)


_NEW_KEY = Ask("NewKeyBody", {"": NewKey}, {"name": "a laptop", "limit": 5})
_KEY_CHANGE = Ask("KeyChangeBody", {"": KeyChange}, {"limit_reset": "monthly"})
_CHAT = Ask("ChatBody", {"Chat": ChatRequest}, _SAY_HELLO, needs=("messages", "prompt"))
_COMPLETIONS = Ask(
    "CompletionsBody",
    {"Completions": CompletionsRequest, "Chat": ChatRequest},
    {"prompt": "Once upon a time"},
    without=("messages",),
)
_RESPONSES = Ask(
    "ResponsesBody",
    {"Responses": ResponsesRequest, "Chat": ChatRequest},
    {"input": "Say hello."},
    without=("messages", "prompt", "n", "previous_response_id", "conversation"),
    needs=("input",),
)
_MESSAGES = Ask(
    "MessagesBody",
    {"Messages": MessagesRequest, "Chat": ChatRequest},
    {**_SAY_HELLO, "max_tokens": 1000},
    without=("logprobs", "n", "prompt", "top_logprobs"),
)
_EMBEDDINGS = Ask("EmbeddingsBody", {"": EmbeddingsRequest}, {"input": "a text"})

OPERATIONS = {
    "/chat/completions": _infer(
        "A reply to a conversation", _CHAT, answers.ChatAnswer, answers.ChatEvent
    ),
    "/completions": _infer(
        "A text continued", _COMPLETIONS, answers.TextCompletion, answers.TextCompletion
    ),
    "/responses": _infer(
        "The same as OpenAI's Responses, without state between requests",
        _RESPONSES,
        answers.Response,
        answers.ResponseEvent,
        errors.ResponsesError,
    ),
    "/messages": _infer(
        "The same as Anthropic's Messages",
        _MESSAGES,
        answers.Message,
        answers.MessageEvent,
        errors.MessagesError,
    ),
    "/embeddings": Operation(
        _INFER,
        "Refused: no model here embeds",
        None,
        (400, 401, 404, 413, 415),
        ask=_EMBEDDINGS,
        needs_key=True,
    ),
    "/models": _told("Which models there are", catalogue.ModelList, (400,), query=ModelsQuery),
    "/models/count": _told(
        "How many models there are", catalogue.ModelCount, (400,), query=ModelsQuery
    ),
    "/models/user": _told(
        "Which models your key may ask",
        catalogue.ModelList,
        (400, 401),
        query=ModelsQuery,
        needs_key=True,
    ),
    "/model/{model}": _told("One model", catalogue.OneModel, (404,)),
    "/models/{model}/endpoints": _told(
        "Where a model is served", catalogue.EndpointsOfModel, (404,)
    ),
    "/endpoints/zdr": _told(
        "Endpoints that keep no word of a request: all of them", catalogue.EndpointList
    ),
    "/providers": _told("Who serves the models", catalogue.ProviderList),
    "/provider/v1/models": _told(
        "The models as OpenRouter reads a provider's list", catalogue.ModelsForRouters
    ),
    "/key": _of_key("What is known of your key", account.KeyAnswer),
    "/auth/key": _of_key("The same, by its older name", account.KeyAnswer),
    "/credits": _of_key("What was bought and used", account.Credits),
    "/generation": _of_key("What is known of one reply", account.Generation, 400, 404, **_ID),
    "/generation/content": _of_key(
        "What was asked and said, if your key's content is logged",
        account.Content,
        400,
        404,
        **_ID,
    ),
    "/activity": _of_key(
        "What was asked on each of the last 30 days that are over",
        account.Activity,
        400,
        date="Only of this day, as YYYY-MM-DD.",
    ),
    "GET /keys": _managed("Every key", account.ManagedKeys, 400, query=KeysQuery),
    "POST /keys": _managed(
        "Make a key", account.NewManagedKey, 400, 413, 415, ask=_NEW_KEY, status=201
    ),
    "GET /keys/{hash}": _managed("One key", account.OneManagedKey, 404),
    "PATCH /keys/{hash}": _managed(
        "Change a key", account.OneManagedKey, 400, 404, 413, 415, ask=_KEY_CHANGE
    ),
    "DELETE /keys/{hash}": _managed("Delete a key", account.Deleted, 404),
    "/health": Operation(_SERVER, "Whether it runs", catalogue.Status),
    "/ready": Operation(
        _SERVER, "Whether it answers requests", catalogue.Status, (503,), refusal=catalogue.Status
    ),
    "/metrics": Operation(
        _SERVER,
        "What Prometheus reads; without a key only on the machine itself",
        catalogue.Text,
        (401,),
        needs_key=True,
        content_type="text/plain",
    ),
    "/openapi.json": Operation(_SERVER, "This description, for programs", catalogue.Document),
    "/docs": Operation(
        _SERVER, "This description, for people", catalogue.Page, content_type="text/html"
    ),
}
"""By path, as the routes have it; of one with several methods, by method and path."""
