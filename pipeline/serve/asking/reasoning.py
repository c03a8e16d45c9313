"""Whether a reply is thought about, for how many tokens at most, and whether that is shown."""

from pipeline.chat import Mode
from pipeline.errors import RequestError
from pipeline.serve.asking.request import ChatRequest, Effort, Reasoning

# OpenRouter's shares of max_tokens, and its bounds of a budget in tokens.
SHARES: dict[Effort, float] = {
    "max": 0.95,
    "xhigh": 0.95,
    "high": 0.8,
    "medium": 0.5,
    "low": 0.2,
    "minimal": 0.1,
}
_MIN_BUDGET, _MAX_BUDGET = 1024, 128_000


def find_mode(request: ChatRequest) -> Mode:
    """Thinking, unless it is switched off: that is Qwen3's own default."""
    wishes = _wishes(request)
    names = {thinks: name for name, thinks in wishes.items()}
    if len(names) == 2:
        raise RequestError(f"{names[True]} and {names[False]} contradict each other; send one")
    return "direct" if False in names else "thinking"


def find_budget(request: ChatRequest, max_tokens: int) -> int | None:
    """How many tokens a thought may have, `</think>` included; None is no bound of its own.

    `max_tokens` are for the whole reply. A thought leaves at least one of them to the answer.
    """
    reasoning = request.reasoning or Reasoning()
    if bound := reasoning.max_tokens or request.thinking_budget:
        return min(bound, max(max_tokens - 1, 1))
    effort = reasoning.effort or request.reasoning_effort
    if effort is None and reasoning.enabled:
        effort = "medium"
    if effort is None or effort == "none":
        return None
    budget = min(int(max_tokens * SHARES[effort]), _MAX_BUDGET)
    if max_tokens > _MIN_BUDGET:  # else a small request would have no room for its answer
        budget = max(budget, _MIN_BUDGET)
    return max(min(budget, max_tokens - 1), 1)


def shows_reasoning(request: ChatRequest) -> bool:
    """Whether the client is told the thought; it is counted either way."""
    if request.reasoning is not None and request.reasoning.exclude is not None:
        return not request.reasoning.exclude
    return request.include_reasoning is not False


def ignored_of_reasoning(request: ChatRequest) -> list[str]:
    """Names of what changes nothing."""
    reasoning = request.reasoning or Reasoning()
    extra = reasoning.model_extra or {}
    names = [f"reasoning.{name}" for name, value in extra.items() if value is not None]
    arguments = request.chat_template_kwargs
    extra = (arguments and arguments.model_extra) or {}
    names += [f"chat_template_kwargs.{name}" for name, value in extra.items() if value is not None]
    if reasoning.exclude is not None and request.include_reasoning is reasoning.exclude:
        names.append("include_reasoning")
    return names


def _wishes(request: ChatRequest) -> dict[str, bool]:
    """Every field that says whether to think, as the client wrote it, and what it says."""
    reasoning, effort = request.reasoning or Reasoning(), request.reasoning_effort
    if reasoning.effort is not None and effort not in (None, reasoning.effort):
        raise RequestError('"reasoning.effort" and "reasoning_effort" differ; send one')
    budget = reasoning.max_tokens
    if budget is not None and (reasoning.effort or effort):
        raise RequestError(
            'Only one of "reasoning.effort" and "reasoning.max_tokens" can be specified'
        )
    wishes = _wishes_in_qwens_words(request)
    if reasoning.enabled is not None:
        wishes[f'"reasoning.enabled": {str(reasoning.enabled).lower()}'] = reasoning.enabled
    if budget is not None:
        wishes[f'"reasoning.max_tokens": {budget}'] = budget > 0
    if reasoning.effort is not None:
        wishes[f'"reasoning.effort": "{reasoning.effort}"'] = reasoning.effort != "none"
    if effort is not None:
        wishes[f'"reasoning_effort": "{effort}"'] = effort != "none"
    return wishes


def _wishes_in_qwens_words(request: ChatRequest) -> dict[str, bool]:
    wishes: dict[str, bool] = {}
    arguments = request.chat_template_kwargs
    switches = {
        "enable_thinking": request.enable_thinking,
        "chat_template_kwargs.enable_thinking": arguments.enable_thinking if arguments else None,
    }
    for name, thinks in switches.items():
        if thinks is not None:
            wishes[f'"{name}": {str(thinks).lower()}'] = thinks
    if request.thinking_budget is not None:
        wishes[f'"thinking_budget": {request.thinking_budget}'] = request.thinking_budget > 0
    return wishes
