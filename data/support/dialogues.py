"""Conversations beyond one question: follow-ups, other languages, tools."""

from typing import Any, NamedTuple

# A chain starts with any question about its first fact; each follow-up leans on what came before.
Chain = tuple[str, tuple[tuple[str, str], ...]]

CHAINS: tuple[Chain, ...] = (
    ("default_temperature", (("max_temperature", "And its upper bound?"),)),
    ("max_temperature", (("default_temperature", "What is its default, then?"),)),
    ("default_presence_penalty", (("max_presence_penalty", "And its maximum?"),)),
    ("default_repetition_penalty", (("max_repetition_penalty", "How high can I set it?"),)),
    ("default_models_limit", (("max_models_limit", "And the largest value it takes?"),)),
    ("default_cache_ttl", (("max_cache_ttl", "What is the maximum of it?"),)),
    ("max_models_limit", (("default_models_limit", "And by default?"),)),
    ("max_top_logprobs", (("default_logprobs", "And the default of logprobs itself?"),)),
    ("min_frequency_penalty", (("default_temperature", "Now the default of `temperature`."),)),
    ("default_top_p", (("default_top_k", "And `top_k`?"), ("default_min_p", "And `min_p`?"))),
    ("default_top_k", (("default_top_p", "What about `top_p`?"),)),
    (
        "default_allow_fallbacks",
        (("default_require_parameters", "And what about `require_parameters`?"),),
    ),
    ("status_no_credits", (("error_payment", "Which error_type comes with it?"),)),
    ("status_unknown_model", (("error_model_not_found", "And the availability code?"),)),
    ("status_rate_limit", (("header_retry_after", "Which header says how long to wait?"),)),
    (
        "status_context",
        (
            ("error_context", "What is the error_type of that?"),
            ("enum_context_compression", "Which plugin avoids it?"),
        ),
    ),
    (
        "status_missing_key",
        (
            ("status_moderation", "And if moderation blocks it?"),
            ("status_rate_limit", "And if I send too many requests?"),
        ),
    ),
    (
        "status_dropped",
        (
            ("status_overloaded", "And if it is overloaded?"),
            ("status_timeout", "And for the error_type `timeout`?"),
        ),
    ),
    (
        "endpoint_generation",
        (
            ("prefix_generation", "What do those ids start with?"),
            ("header_generation_id", "And which header carries such an id?"),
            ("status_unknown_generation", "Which status do I get if the id is wrong?"),
        ),
    ),
    ("endpoint_key", (("prefix_key", "And what does such a key start with?"),)),
    ("endpoint_credits", (("status_no_credits", "Which status comes when they are used up?"),)),
    ("endpoint_messages", (("endpoint_responses", "And the one for OpenAI Responses?"),)),
    (
        "endpoint_chat",
        (
            ("default_stream", "What is the default of `stream` there?"),
            ("enum_event_stream", "Which content type comes when I turn it on?"),
        ),
    ),
    ("header_cache", (("max_cache_ttl", "And the upper bound of its TTL?"),)),
    (
        "enum_tool_calls",
        (("default_parallel_tool_calls", "Is parallel_tool_calls true or false there?"),),
    ),
    ("enum_json_schema", (("enum_response_healing", "And if the JSON is broken?"),)),
    ("field_reasoning_effort", (("field_reasoning_tokens", "Where are those tokens counted?"),)),
    ("count_free_minute", (("count_free_day", "And per day, below ten credits?"),)),
)

# Each joins facts which no training conversation joins.
HELDOUT_CHAINS: tuple[Chain, ...] = (
    (
        "default_frequency_penalty",
        (("min_frequency_penalty", "How far down may I push that one?"),),
    ),
    ("header_cache", (("default_cache_ttl", "Good. What TTL in seconds applies as its default?"),)),
    ("max_logit_bias", (("min_logit_bias", "What number is at the other end of that range?"),)),
    (
        "status_rate_limit",
        (("error_rate_limit", "Now handling that 429: under what `error_type` is it filed?"),),
    ),
    ("enum_event_stream", (("enum_done", "And what does its very final data line say?"),)),
    (
        "enum_tool_calls",
        (("field_tool_call_id", "I ran the tool. What key ties my result message to that call?"),),
    ),
    (
        "count_metadata_pairs",
        (("count_metadata_value", "Fine, and how many characters fit into each single value?"),),
    ),
    (
        "endpoint_models",
        (
            (
                "default_models_limit",
                "So `GET /models` takes a `limit` too: may I know its default?",
            ),
        ),
    ),
)

OTHER_LANGUAGES = (
    ("default_temperature", "Was ist der Standardwert von `temperature`?"),
    ("status_rate_limit", "Welchen Statuscode bekomme ich bei zu vielen Anfragen?"),
    ("prefix_key", "Womit beginnt ein API-Schlüssel?"),
    ("count_stop", "Wie viele Sequenzen darf `stop` höchstens enthalten?"),
    ("endpoint_chat", "Quel est le chemin pour les requêtes de chat ?"),
    ("status_no_credits", "Quel code de statut quand mes crédits sont épuisés ?"),
    ("max_temperature", "Quelle est la valeur maximale de `temperature` ?"),
    ("enum_done", "Comment se termine un flux de chat ?"),
    ("default_top_p", "`top_p` 的默认值是多少?"),
    ("endpoint_models", "哪个接口可以列出所有模型?"),
    ("header_retry_after", "哪个响应头说明要等待多久?"),
    ("status_missing_key", "没有发送 API 密钥时返回什么状态码?"),
)


class Tool(NamedTuple):
    """A tool the assistant may call, with its one argument ("" for none)."""

    purpose: str
    argument: str


TOOLS = {
    "get_generation": Tool("Statistics of one generation.", "id"),
    "list_models": Tool("Search the model list.", "query"),
    "get_key_info": Tool("Usage and limits of the user's key.", ""),
    "get_endpoints": Tool("Endpoints of one model.", "model"),
}


class ToolCase(NamedTuple):
    """A question only a tool can answer; the first of `tools` is the one to call."""

    question: str
    tools: tuple[str, ...]
    argument: str
    result: dict[str, Any]
    answer: str


GENERATION = ("get_generation", "get_key_info")
MODELS = ("list_models", "get_endpoints")
KEY = ("get_key_info", "get_generation")
PLACES = ("get_endpoints", "list_models")

TOOL_CASES = (
    ToolCase(
        "What did generation gen-17-aB3 cost?",
        GENERATION,
        "gen-17-aB3",
        {"id": "gen-17-aB3", "total_cost": 0.0021},
        "Generation `gen-17-aB3` cost `0.0021` USD.",
    ),
    ToolCase(
        "Why did gen-17-Xy9 stop?",
        GENERATION,
        "gen-17-Xy9",
        {"id": "gen-17-Xy9", "finish_reason": "length"},
        "Generation `gen-17-Xy9` stopped with finish_reason `length`.",
    ),
    ToolCase(
        "Which provider served gen-18-Qr4?",
        GENERATION,
        "gen-18-Qr4",
        {"id": "gen-18-Qr4", "provider_name": "Acme"},
        "Generation `gen-18-Qr4` was served by `Acme`.",
    ),
    ToolCase(
        "How many completion tokens did gen-18-Tz1 have?",
        GENERATION,
        "gen-18-Tz1",
        {"id": "gen-18-Tz1", "tokens_completion": 318},
        "Generation `gen-18-Tz1` has `318` completion tokens.",
    ),
    ToolCase(
        "Was gen-19-Lm5 cancelled?",
        ("get_generation",),
        "gen-19-Lm5",
        {"id": "gen-19-Lm5", "cancelled": True},
        "Yes, generation `gen-19-Lm5` was cancelled.",
    ),
    ToolCase(
        "Please look up the price of generation gen-20-Hk7.",
        ("get_generation", "list_models"),
        "gen-20-Hk7",
        {"id": "gen-20-Hk7", "total_cost": 0.013},
        "Generation `gen-20-Hk7` cost `0.013` USD.",
    ),
    ToolCase(
        "Which model wrote gen-21-Wd2?",
        GENERATION,
        "gen-21-Wd2",
        {"id": "gen-21-Wd2", "model": "qwen/qwen3-8b"},
        "Generation `gen-21-Wd2` was written by `qwen/qwen3-8b`.",
    ),
    ToolCase(
        "How much of my key's limit is left?",
        KEY,
        "",
        {"limit": 25, "limit_remaining": 7.5},
        "Your key has `7.5` credits of its limit left.",
    ),
    ToolCase(
        "How much did I spend today?",
        KEY,
        "",
        {"usage_daily": 1.25, "usage_monthly": 18.4},
        "Your key used `1.25` credits today.",
    ),
    ToolCase(
        "What is my usage this month?",
        KEY,
        "",
        {"usage_daily": 0.3, "usage_monthly": 42.7},
        "Your key used `42.7` credits this month.",
    ),
    ToolCase(
        "Am I on the free tier?",
        ("get_key_info",),
        "",
        {"is_free_tier": False, "usage": 3.2},
        "No, your key is not on the free tier.",
    ),
    ToolCase(
        "Does my key have a limit?",
        ("get_key_info", "list_models"),
        "",
        {"limit": None, "usage": 11.9},
        "No, your key has no limit.",
    ),
    ToolCase(
        "When does my API key expire?",
        KEY,
        "",
        {"expires_at": "2027-03-01T00:00:00Z"},
        "Your key expires at `2027-03-01T00:00:00Z`.",
    ),
    ToolCase(
        "What is the context length of qwen3-8b?",
        MODELS,
        "qwen3-8b",
        {"data": [{"id": "qwen/qwen3-8b", "context_length": 131072}]},
        "`qwen/qwen3-8b` has a context length of `131072` tokens.",
    ),
    ToolCase(
        "Is there any model called ocelot?",
        MODELS,
        "ocelot",
        {"data": []},
        "No, the model list has no model called `ocelot`.",
    ),
    ToolCase(
        "What is the exact id of Acme's heron model?",
        MODELS,
        "heron",
        {"data": [{"id": "acme/heron-3b"}]},
        "The id is `acme/heron-3b`.",
    ),
    ToolCase(
        "What does a prompt token cost with acme/heron-3b?",
        ("list_models", "get_key_info"),
        "acme/heron-3b",
        {"data": [{"id": "acme/heron-3b", "pricing": {"prompt": "0.0000002"}}]},
        "A prompt token of `acme/heron-3b` costs `0.0000002` USD.",
    ),
    ToolCase(
        "Find the id of the model named Wren.",
        ("list_models",),
        "Wren",
        {"data": [{"id": "acme/wren-1b"}]},
        "The id is `acme/wren-1b`.",
    ),
    ToolCase(
        "Who serves qwen/qwen3-8b?",
        PLACES,
        "qwen/qwen3-8b",
        {"endpoints": [{"provider_name": "Acme"}]},
        "`qwen/qwen3-8b` is served by `Acme`.",
    ),
    ToolCase(
        "In which quantization is acme/wren-1b served?",
        PLACES,
        "acme/wren-1b",
        {"endpoints": [{"tag": "acme/bf16", "quantization": "bf16"}]},
        "`acme/wren-1b` is served in `bf16`.",
    ),
    ToolCase(
        "What was the uptime of acme/heron-3b in the last day?",
        ("get_endpoints", "get_generation"),
        "acme/heron-3b",
        {"endpoints": [{"uptime_last_1d": 99.2}]},
        "The uptime of `acme/heron-3b` was `99.2` percent in the last day.",
    ),
    ToolCase(
        "How many tokens may qwen/qwen3-8b write at most?",
        ("get_endpoints",),
        "qwen/qwen3-8b",
        {"endpoints": [{"max_completion_tokens": 8192}]},
        "`qwen/qwen3-8b` may write at most `8192` tokens.",
    ),
)
