"""Bodies that are answered, by route: together they have every field that is read."""

from typing import Any

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FUNCTION = {"name": "f", "description": "Does it.", "parameters": SCHEMA}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
SAMPLING = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.1,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "repetition_penalty": 1.1,
    "seed": 7,
    "logit_bias": {"5": -10},
}
ROUTING = {
    "model": "local/tiny",
    "models": ["local/tiny"],
    "route": "fallback",
    "provider": {
        "order": ["pipeline"],
        "only": ["pipeline"],
        "ignore": ["another"],
        "allow_fallbacks": True,
        "require_parameters": False,
        "data_collection": "deny",
        "zdr": True,
        "enforce_distillable_text": False,
        "sort": {"by": "price", "partition": "none"},
        "preferred_min_throughput": 1,
        "preferred_max_latency": {"p50": 100},
        "max_price": {"prompt": 1, "completion": "2", "request": 0},
    },
    "plugins": [{"id": "context-compression"}, {"id": "web", "enabled": False}],
    "transforms": ["middle-out"],
}
LABELS = {
    "session_id": "one",
    "prompt_cache_key": "two",
    "user": "me",
    "metadata": {"a": "b"},
    "trace": {"trace_id": "1"},
    "top_a": 0.5,
    "verbosity": "low",
    "service_tier": "default",
    "structured_outputs": True,
    "modalities": ["text"],
    "debug": {"echo_upstream_body": True},
}
CHAT: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hi"}], **SAMPLING, **ROUTING, **LABELS},
    {
        "stream": True,
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": "hi", "name": "me"},
            {
                "role": "assistant",
                "content": None,
                "reasoning": "hm",
                "reasoning_details": [{"type": "reasoning.text", "text": "hm"}],
                "tool_calls": [CALL],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "1"},
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"max_tokens": 5, "exclude": True, "enabled": True},
        "max_completion_tokens": 50,
        "n": 2,
        "stop": ["END"],
    },
    {
        "messages": [{"role": "user", "content": "hi"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
        "reasoning_effort": "low",
        "include_reasoning": False,
        "logprobs": True,
        "top_logprobs": 2,
        "max_tokens": 50,
    },
    {
        "messages": [{"role": "user", "content": "hi"}],
        "enable_thinking": True,
        "thinking_budget": 5,
        "chat_template_kwargs": {"enable_thinking": True},
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    },
    {"prompt": "Once upon a time", "stop": "END"},
]
COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": "Once", "logprobs": 2, "max_tokens": 9, "stream": True, **SAMPLING, **ROUTING},
    {"prompt": ["Once"], "stop": ["END"], "n": 2, **LABELS},
]
RESPONSES: list[dict[str, Any]] = [
    {"input": "hi", "instructions": "Be brief.", "max_output_tokens": 50, **SAMPLING, **ROUTING},
    {
        "stream": True,
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "summary": [], "content": []},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "1"},
        ],
        "tools": [{"type": "function", **FUNCTION, "strict": True}],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []},
        "parallel_tool_calls": True,
        "reasoning": {"effort": "low"},
        "truncation": "auto",
        "store": False,
        "background": False,
        **LABELS,
    },
    {
        "input": "hi",
        "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}},
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "tool_choice": "none",
    },
]
MESSAGES: list[dict[str, Any]] = [
    {
        "max_tokens": 50,
        "system": "Be brief.",
        "messages": [{"role": "user", "content": "hi"}],
        "stop_sequences": ["END"],
        "thinking": {"type": "enabled", "budget_tokens": 5},
        "metadata": {"user_id": "me"},
        **{name: SAMPLING[name] for name in ("temperature", "top_p", "top_k")},
    },
    {
        "max_tokens": 50,
        "stream": True,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "1", "content": "1"}],
            },
        ],
        "tools": [{"name": "f", "description": "Does it.", "input_schema": SCHEMA}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "disabled"},
    },
    {
        "max_tokens": 50,
        "model": "local/tiny",
        "fallbacks": [{"model": "local/tiny"}],
        "messages": [{"role": "user", "content": "hi"}],
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
        "provider": ROUTING["provider"],
    },
]
ANSWERED = {
    "/chat/completions": CHAT,
    "/completions": COMPLETIONS,
    "/responses": RESPONSES,
    "/messages": MESSAGES,
}
