"""The facts the support assistant has to know, each with its questions and its one answer."""

from typing import NamedTuple


class Fact(NamedTuple):
    """One thing to know: `topic` completes "The user asks about ...", `answer` names `value`."""

    id: str
    kind: str
    value: str
    topic: str
    answer: str
    train: tuple[str, ...]
    heldout: tuple[str, ...]


# {code} is the field as code, {plain} the same without backticks: users write both.
DEFAULT_QUESTIONS = (
    "What is the default of {code}?",
    "Which default value does {code} have?",
    "What does {code} default to?",
    "Tell me the default for {code}.",
    "{plain} default?",
    "Which value is listed as the default of {plain}?",
    "I need the documented default of {code}, please.",
    "By default, what is {code} set to?",
    "Could you look up what {plain} is by default?",
    "Does {code} come with a default, and which one?",
    "My colleague wants to know the standard value of {code}.",
    "What is the standard setting for {plain}?",
)
DEFAULT_HELDOUT = (
    "Out of the box, where does {code} stand?",
    "Name the default setting that the docs print next to {code}.",
    "I am reading the parameter table. Which default belongs in the row for {code}?",
    "For a wrapper I have to hard-code the usual default for {plain}; which is it?",
    "What would you call the stock value for {code} on OpenRouter?",
    "Our form should pre-fill {code} with OpenRouter's own default. What goes in?",
    "Before I change {code}: how is it set as standard, according to the reference?",
)
MAXIMUM_QUESTIONS = (
    "What is the maximum of {code}?",
    "How high can {code} go?",
    "Which upper limit does {code} have?",
    "What is the largest allowed value for {plain}?",
    "Tell me the upper bound of {code}.",
    "{plain} max?",
    "Which number is the top of the range of {code}?",
    "I want the highest {plain} there is. Which number do I send?",
)
MAXIMUM_HELDOUT = (
    "At which value does OpenRouter cap {code}?",
    "Where is the ceiling for {plain}?",
    "If I turn {code} all the way up, which number is that?",
    "What is the greatest number that I may still pass as {code}?",
)
MINIMUM_QUESTIONS = (
    "What is the minimum of {code}?",
    "How low can {code} go?",
    "Which lower limit does {code} have?",
    "What is the smallest allowed value for {plain}?",
    "Tell me the lower bound of {code}.",
    "{plain} min?",
)
MINIMUM_HELDOUT = (
    "How far below zero may I set {code}?",
    "Which negative number is the floor for {plain}?",
)


def rotated(templates: tuple[str, ...], start: int, count: int, code: str) -> tuple[str, ...]:
    """`count` templates from `start` on, so that neighbouring facts are not asked alike."""
    plain = code.replace("`", "")
    chosen = (templates[(start + step) % len(templates)] for step in range(count))
    return tuple(template.format(code=code, plain=plain) for template in chosen)


def default(turn: int, name: str, value: str, code: str = "", unit: str = "") -> Fact:
    """The documented default of one field."""
    code = code or f"`{name}`"
    return Fact(
        id=f"default_{name}",
        kind="default",
        value=value,
        topic=f"the default of {code}",
        answer=f"The default of {code} is `{value}`{unit}.",
        train=rotated(DEFAULT_QUESTIONS, turn * 5, 6, code),
        heldout=rotated(DEFAULT_HELDOUT, turn, 1, code),
    )


def maximum(turn: int, name: str, value: str, code: str = "", unit: str = "") -> Fact:
    """The upper end of one field's range."""
    code = code or f"`{name}`"
    return Fact(
        id=f"max_{name}",
        kind="bound",
        value=value,
        topic=f"the upper bound of {code}",
        answer=f"The upper bound of {code} is `{value}`{unit}.",
        train=rotated(MAXIMUM_QUESTIONS, turn * 3, 6, code),
        heldout=rotated(MAXIMUM_HELDOUT, turn, 1, code),
    )


def minimum(turn: int, name: str, value: str) -> Fact:
    """The lower end of one field's range."""
    code = f"`{name}`"
    return Fact(
        id=f"min_{name}",
        kind="bound",
        value=value,
        topic=f"the lower bound of {code}",
        answer=f"The lower bound of {code} is `{value}`.",
        train=rotated(MINIMUM_QUESTIONS, turn, 6, code),
        heldout=rotated(MINIMUM_HELDOUT, turn, 1, code),
    )


LIMIT = "`limit` of `GET /models`"
CACHE_TTL = "`X-OpenRouter-Cache-TTL`"

DEFAULTS = (
    default(0, "temperature", "1"),
    default(1, "top_p", "1"),
    default(2, "top_k", "0"),
    default(3, "min_p", "0"),
    default(4, "frequency_penalty", "0"),
    default(5, "presence_penalty", "0"),
    default(6, "repetition_penalty", "1"),
    default(7, "stream", "false"),
    default(8, "logprobs", "false"),
    default(9, "parallel_tool_calls", "true"),
    default(10, "verbosity", "medium"),
    default(11, "allow_fallbacks", "true", "`provider.allow_fallbacks`"),
    default(12, "require_parameters", "false", "`provider.require_parameters`"),
    default(13, "models_limit", "500", LIMIT),
    default(14, "cache_ttl", "300", CACHE_TTL, " seconds"),
)

BOUNDS = (
    maximum(0, "temperature", "2"),
    maximum(1, "presence_penalty", "2"),
    maximum(2, "repetition_penalty", "2"),
    maximum(3, "top_logprobs", "20"),
    maximum(4, "logit_bias", "100"),
    maximum(5, "models_limit", "1000", LIMIT),
    maximum(6, "cache_ttl", "86400", CACHE_TTL, " seconds"),
    minimum(0, "frequency_penalty", "-2"),
    minimum(1, "logit_bias", "-100"),
)

COUNTS = (
    Fact(
        id="count_stop",
        kind="count",
        value="4",
        topic="how many sequences `stop` takes",
        answer="`stop` takes at most `4` sequences.",
        train=(
            "How many sequences may `stop` contain?",
            "What is the maximum number of stop strings?",
            "I have a list of stop words. How many of them can I send in `stop`?",
            "Is there a limit on the entries of stop, and how big is it?",
            "How many items may the array in `stop` have?",
        ),
        heldout=(
            "Our request has a lot of stop sequences. At how many does OpenRouter draw the line?",
        ),
    ),
    Fact(
        id="count_session_id",
        kind="count",
        value="256",
        topic="the maximum length of `session_id`",
        answer="`session_id` may have at most `256` characters.",
        train=(
            "How long may `session_id` be?",
            "What is the maximum length of session_id?",
            "How many characters fit into `session_id`?",
            "Is there a size limit for `session_id`?",
            "My session_id is a long string. Up to which length is it accepted?",
        ),
        heldout=("We build `session_id` from a URL; after how many characters is it too big?",),
    ),
    Fact(
        id="count_metadata_pairs",
        kind="count",
        value="16",
        topic="how many pairs `metadata` holds",
        answer="`metadata` holds at most `16` pairs.",
        train=(
            "How many pairs can `metadata` hold?",
            "What is the maximum number of entries in metadata?",
            "How many keys may I put into `metadata`?",
            "Is there a limit on the number of metadata pairs?",
            "Up to how many key-value pairs does `metadata` accept?",
        ),
        heldout=("I attach labels to requests with `metadata`. After how many pairs is it full?",),
    ),
    Fact(
        id="count_metadata_value",
        kind="count",
        value="512",
        topic="the maximum length of a value in `metadata`",
        answer="A value in `metadata` may have at most `512` characters.",
        train=(
            "How long may a value in `metadata` be?",
            "What is the maximum length of a metadata value?",
            "How many characters can one `metadata` value have?",
            "I store a long text as a value in `metadata`. What is the limit?",
            "Is the length of metadata values limited, and to what?",
        ),
        heldout=("We keep a description as a `metadata` value. How many characters is too long?",),
    ),
    Fact(
        id="count_function_name",
        kind="count",
        value="64",
        topic="the maximum length of a tool's function name",
        answer="A tool's function name may have at most `64` characters.",
        train=(
            "How long may the function name of a tool be?",
            "What is the maximum length of a tool name?",
            "How many characters can a tool's function name have?",
            "Is the length of function names in `tools` limited?",
            "I generate names for my tools. How long can they get?",
        ),
        heldout=(
            "One of my `tools` has a very long function name. How many characters may it have?",
        ),
    ),
    Fact(
        id="count_free_minute",
        kind="count",
        value="20",
        topic="the requests per minute on `:free` models",
        answer="`:free` models allow `20` requests per minute.",
        train=(
            "How many requests per minute can I send to `:free` models?",
            "What is the rate limit per minute of a free model?",
            "How often may I call a `:free` variant in one minute?",
            "Which per-minute limit do free variants have?",
            "I use a :free model. How many calls a minute are allowed?",
        ),
        heldout=("With a `:free` variant, after how many calls within a minute am I throttled?",),
    ),
    Fact(
        id="count_free_day",
        kind="count",
        value="50",
        topic="the requests per day on `:free` models below ten credits",
        answer="Below ten credits bought, `:free` models allow `50` requests per day.",
        train=(
            "How many requests per day can I send to `:free` models without buying credits?",
            "What is the daily limit of free models if I bought fewer than ten credits?",
            "I never bought credits. How many free calls do I get each day?",
            "Which daily limit do `:free` variants have below ten credits?",
            "How often may I use a :free model in one day with less than ten credits bought?",
        ),
        heldout=(
            "My account has bought no credits: what daily quota do I have on `:free` models?",
        ),
    ),
    Fact(
        id="count_budget_floor",
        kind="count",
        value="1024",
        topic="the smallest reasoning budget for Anthropic models",
        answer="For Anthropic models the reasoning budget is at least `1024` tokens.",
        train=(
            "What is the smallest reasoning budget for Anthropic models?",
            "How many reasoning tokens does an Anthropic model get at least?",
            "Which minimum does the reasoning budget of Anthropic models have?",
            "How low can the reasoning budget of an Anthropic model go?",
            "Effort is minimal on an Anthropic model. Which token budget is the least?",
        ),
        heldout=("Below how many tokens will an Anthropic model's reasoning budget never fall?",),
    ),
)

STATUSES = (
    Fact(
        id="status_unknown_model",
        kind="status",
        value="400",
        topic="the status of an unknown model id",
        answer="An unknown model id gives status `400`.",
        train=(
            "Which status code do I get for an unknown model?",
            "I misspelled the model id in a chat request. Which HTTP status comes back?",
            "What status does a model id that does not exist give?",
            "The error says my id is not a valid model ID. Which status is that?",
            "Status code for an invalid model name?",
        ),
        heldout=(
            "There is a typo in `model` and no such model exists. What HTTP code will chat answer?",
        ),
    ),
    Fact(
        id="status_effort_and_budget",
        kind="status",
        value="400",
        topic="the status of sending both `reasoning.effort` and `reasoning.max_tokens`",
        answer="Sending both `reasoning.effort` and `reasoning.max_tokens` gives status `400`.",
        train=(
            "What happens if I send both `reasoning.effort` and `reasoning.max_tokens`?",
            "Which status do I get for effort together with max_tokens in `reasoning`?",
            "I set effort and max_tokens in reasoning at once. Which HTTP status is that?",
            "Can I combine `reasoning.effort` with `reasoning.max_tokens`, or which error comes?",
            "Status code when reasoning has an effort and also max_tokens?",
        ),
        heldout=(
            "My `reasoning` object holds effort plus max_tokens and is refused: with what code?",
        ),
    ),
    Fact(
        id="status_context",
        kind="status",
        value="400",
        topic="the status of a prompt longer than the context window",
        answer="A prompt longer than the context window gives status `400`.",
        train=(
            "Which status code do I get when the prompt exceeds the context window?",
            "My prompt is longer than the context of the model. What status comes back?",
            "What HTTP status does a context overflow give?",
            "The prompt plus `max_tokens` is larger than the window. Which status is that?",
            "Status code for a prompt that is too long?",
        ),
        heldout=(
            "I sent more tokens than the model's window holds. What HTTP code should I expect?",
        ),
    ),
    Fact(
        id="status_missing_key",
        kind="status",
        value="401",
        topic="the status of a request without Authorization header",
        answer="A request without Authorization header gives status `401`.",
        train=(
            "Which status code do I get without an Authorization header?",
            "I forgot to send my API key. What HTTP status comes back?",
            "What status means that the authentication header is missing?",
            "My request has no bearer token. Which status is that?",
            "Status code when the Authorization header is missing?",
        ),
        heldout=("Somebody calls chat with no API key at all. What HTTP code will they see?",),
    ),
    Fact(
        id="status_no_credits",
        kind="status",
        value="402",
        topic="the status when the credits are used up",
        answer="When the credits are used up the status is `402`.",
        train=(
            "Which status code do I get when my credits are used up?",
            "I have insufficient credits. What HTTP status comes back?",
            "What status says that the credit limit of the key is reached?",
            "My account ran out of credits. Which status is that?",
            "Status code for insufficient credits?",
        ),
        heldout=("The balance is empty and nothing was topped up. What HTTP code tells me so?",),
    ),
    Fact(
        id="status_moderation",
        kind="status",
        value="403",
        topic="the status when moderation blocks the input",
        answer="When moderation blocks the input the status is `403`.",
        train=(
            "Which status code do I get when moderation blocks my input?",
            "My prompt was flagged by moderation. What HTTP status comes back?",
            "What status does a guardrail block give?",
            "A guardrail stopped the request. Which status is that?",
            "Status code for flagged input?",
        ),
        heldout=(
            "The input got flagged and moderation refused it: what HTTP code is used for this?",
        ),
    ),
    Fact(
        id="status_unknown_generation",
        kind="status",
        value="404",
        topic="the status of an unknown generation id",
        answer="An unknown generation id gives status `404`.",
        train=(
            "Which status code do I get for an unknown generation id?",
            "I asked for a generation that does not exist. What HTTP status comes back?",
            "What status does `GET /generation` give for a wrong id?",
            "The generation was not found. Which status is that?",
            "Status code when a generation id is not known?",
        ),
        heldout=(
            "I looked up a generation under an id nobody ever issued. What HTTP code results?",
        ),
    ),
    Fact(
        id="status_body_too_large",
        kind="status",
        value="413",
        topic="the status of a request body that is too large",
        answer="A request body that is too large gives status `413`.",
        train=(
            "Which status code do I get when the request body is too large?",
            "My payload is too big. What HTTP status comes back?",
            "What status does an oversized request body give?",
            "I posted a huge JSON body. Which status is that?",
            "Status code for a payload that is too large?",
        ),
        heldout=("We upload an enormous payload in one request; what HTTP code rejects its size?",),
    ),
    Fact(
        id="status_rate_limit",
        kind="status",
        value="429",
        topic="the status when the rate limit is exceeded",
        answer="When the rate limit is exceeded the status is `429`.",
        train=(
            "Which status code do I get when I exceed the rate limit?",
            "I send too many requests. What HTTP status comes back?",
            "What status means that I am rate limited?",
            "The rate limit was hit. Which status is that?",
            "Status code for too many requests?",
        ),
        heldout=("We fire calls much too quickly and get throttled. What HTTP code signals that?",),
    ),
    Fact(
        id="status_dropped",
        kind="status",
        value="502",
        topic="the status when the provider is unavailable",
        answer="When the provider drops the connection the status is `502`.",
        train=(
            "Which status code do I get when the provider drops the connection?",
            "The provider sent an invalid answer. What HTTP status comes back?",
            "What status goes with `provider_unavailable`?",
            "The upstream connection broke before the first token. Which status is that?",
            "Status code when the provider is unavailable?",
        ),
        heldout=("Before any token came, the provider hung up. What HTTP code do I receive?",),
    ),
    Fact(
        id="status_overloaded",
        kind="status",
        value="503",
        topic="the status when the provider is overloaded",
        answer="When the provider is overloaded the status is `503`.",
        train=(
            "Which status code do I get when the provider is overloaded?",
            "The provider has too much load. What HTTP status comes back?",
            "What status goes with `provider_overloaded`?",
            "The provider cannot take more work. Which status is that?",
            "Status code for an overloaded provider?",
        ),
        heldout=("The error_type reads `provider_overloaded`. What HTTP code is it mapped to?",),
    ),
    Fact(
        id="status_timeout",
        kind="status",
        value="504",
        topic="the status of error_type `timeout`",
        answer="The error_type `timeout` has status `504`.",
        train=(
            "Which status code goes with the error_type `timeout`?",
            "The error_type is timeout. What HTTP status comes with it?",
            "What status does `timeout` map to?",
            "My error has error_type `timeout`. Which status is that?",
            "Status code for error_type timeout?",
        ),
        heldout=("In the error table, what HTTP code stands beside the type `timeout`?",),
    ),
)

ERRORS = (
    Fact(
        id="error_payment",
        kind="error",
        value="payment_required",
        topic="the error_type of status 402",
        answer="Status 402 has the error_type `payment_required`.",
        train=(
            "Which error_type goes with status 402?",
            "What is the error_type when I have to pay first?",
            "My request fails with 402. What does error_type say?",
            "Tell me the error_type for 402.",
            "What type of error is reported together with code 402?",
        ),
        heldout=("Under what `error_type` does OpenRouter file a 402 response?",),
    ),
    Fact(
        id="error_rate_limit",
        kind="error",
        value="rate_limit_exceeded",
        topic="the error_type of status 429",
        answer="Status 429 has the error_type `rate_limit_exceeded`.",
        train=(
            "Which error_type goes with status 429?",
            "What is the error_type when I send too many requests?",
            "My request fails with 429. What does error_type say?",
            "Tell me the error_type for 429.",
            "What type of error is reported together with code 429?",
        ),
        heldout=(
            "I want to catch 429 responses by their `error_type`; which string do I compare?",
        ),
    ),
    Fact(
        id="error_context",
        kind="error",
        value="context_length_exceeded",
        topic="the error_type of a prompt that overflows the context window",
        answer="A prompt that overflows the window has the error_type `context_length_exceeded`.",
        train=(
            "Which error_type do I get when the prompt exceeds the context window?",
            "What is the error_type of a context overflow?",
            "My prompt is longer than the context. What does error_type say?",
            "Tell me the error_type for a prompt that is too long.",
            "What type of error is reported when the window is too small for my prompt?",
        ),
        heldout=("By what `error_type` can I recognise that the prompt did not fit the window?",),
    ),
    Fact(
        id="error_model_not_found",
        kind="error",
        value="model_not_found",
        topic="the availability code of an unknown model",
        answer="An unknown model has the availability code `model_not_found`.",
        train=(
            "Which availability code does an unknown model have?",
            "What is `error.availability.code` when the model does not exist?",
            "My model id is wrong. What does the availability code say?",
            "Tell me the availability code for an unknown model.",
            "What code does `error.availability` show for a model nobody serves under that name?",
        ),
        heldout=("No such model exists. What will I read in `availability.code`?",),
    ),
)

FIELDS = (
    Fact(
        id="field_max_completion_tokens",
        kind="field",
        value="max_completion_tokens",
        topic="the preferred alias of `max_tokens`",
        answer="The preferred alias of `max_tokens` is `max_completion_tokens`.",
        train=(
            "Which field is the preferred alias of `max_tokens`?",
            "What should I send instead of `max_tokens`?",
            "Is there another name for `max_tokens`, and which one?",
            "Tell me the preferred name for max_tokens.",
            "max_tokens has an alias. Which one is preferred?",
        ),
        heldout=("I still cap output with `max_tokens`. What alias would OpenRouter rather see?",),
    ),
    Fact(
        id="field_seed",
        kind="field",
        value="seed",
        topic="the field for repeatable output",
        answer="For repeatable output send `seed`.",
        train=(
            "Which field makes the output repeatable?",
            "How do I get the same text for the same request?",
            "I want deterministic sampling. Which parameter do I set?",
            "Tell me the parameter for reproducible answers.",
            "What do I send to get the same output again?",
        ),
        heldout=(
            "Two identical calls ought to return identical text. What parameter helps me there?",
        ),
    ),
    Fact(
        id="field_native_finish_reason",
        kind="field",
        value="native_finish_reason",
        topic="the field with the provider's raw finish reason",
        answer="The provider's raw finish reason is in `native_finish_reason`.",
        train=(
            "Which field has the raw finish reason of the provider?",
            "Where do I find the finish reason before it is normalised?",
            "I need the original finish reason. Which field of the choice has it?",
            "Tell me the field for the provider's own finish reason.",
            "What is the raw counterpart of `finish_reason` called?",
        ),
        heldout=(
            "`finish_reason` is normalised; under what key is the engine's own raw one kept?",
        ),
    ),
    Fact(
        id="field_tool_call_id",
        kind="field",
        value="tool_call_id",
        topic="the field a tool message must carry",
        answer="A tool message must carry `tool_call_id`.",
        train=(
            "Which field must a tool message carry?",
            "How does a tool result refer to its call?",
            "What is required in a message with role `tool` besides its content?",
            "I send back a tool result. Which field links it to the call?",
            "Tell me the required field of tool messages.",
        ),
        heldout=("In a message of role `tool`, what key says which call it belongs to?",),
    ),
    Fact(
        id="field_cached_tokens",
        kind="field",
        value="cached_tokens",
        topic="the usage field that counts prompt tokens from the cache",
        answer="Prompt tokens from the cache are counted in `cached_tokens`.",
        train=(
            "Which usage field counts prompt tokens from the cache?",
            "Where do I see how many prompt tokens were cached?",
            "Tell me the field of `prompt_tokens_details` for cache hits.",
            "I want to know how much of my prompt came from the cache. Which field is it?",
            "How is the number of cached prompt tokens called in `usage`?",
        ),
        heldout=(
            "Inside `prompt_tokens_details`, what entry tells me how well prompt caching worked?",
        ),
    ),
    Fact(
        id="field_reasoning_tokens",
        kind="field",
        value="reasoning_tokens",
        topic="the usage field that counts the thinking",
        answer="The tokens of the thinking are counted in `reasoning_tokens`.",
        train=(
            "Which usage field counts the tokens of the thinking?",
            "Where do I see how many tokens the model spent on thinking?",
            "Tell me the field of `completion_tokens_details` for the thinking.",
            "I want to know how long the model thought. Which usage field is it?",
            "How is the number of thinking tokens called in `usage`?",
        ),
        heldout=(
            "Inside `completion_tokens_details`, what entry shows the cost of thinking in tokens?",
        ),
    ),
    Fact(
        id="field_max_price",
        kind="field",
        value="max_price",
        topic="the provider preference that limits the price",
        answer="The price is limited with `max_price` in `provider`.",
        train=(
            "Which provider preference limits the price?",
            "How do I exclude expensive providers?",
            "I want to pay no more than a fixed price per million tokens. Which field do I set?",
            "Tell me the field of `provider` for a price limit.",
            "What do I put into `provider` to cap the cost per token?",
        ),
        heldout=("Providers above my budget should be skipped. What key of `provider` does that?",),
    ),
    Fact(
        id="field_reasoning_effort",
        kind="field",
        value="reasoning_effort",
        topic="the top-level field equal to `reasoning.effort`",
        answer="The top-level field equal to `reasoning.effort` is `reasoning_effort`.",
        train=(
            "Which top-level field is the same as `reasoning.effort`?",
            "How do I set the effort without a `reasoning` object?",
            "Is there a short form of `reasoning.effort`?",
            "Tell me the flat spelling of reasoning.effort.",
            "I cannot send nested objects. Which field replaces `reasoning.effort`?",
        ),
        heldout=("What flat parameter may I use in place of the nested `reasoning.effort`?",),
    ),
)

ENDPOINTS = (
    Fact(
        id="endpoint_chat",
        kind="endpoint",
        value="/chat/completions",
        topic="the endpoint for chat",
        answer="Chat requests go to POST `/chat/completions`.",
        train=(
            "Which endpoint do I call for chat?",
            "Where do I post my chat messages?",
            "Tell me the path for chat requests.",
            "What is the main endpoint of the API?",
            "I want an answer from a model. Which path do I use?",
        ),
        heldout=("To hold a conversation with a model, what route should my client POST to?",),
    ),
    Fact(
        id="endpoint_models",
        kind="endpoint",
        value="/models",
        topic="the endpoint that lists all models",
        answer="All models are listed by GET `/models`.",
        train=(
            "Which endpoint lists all models?",
            "Where do I get the list of models?",
            "Tell me the path for the model catalogue.",
            "How can I see every model that is offered?",
            "I want to fetch the model list. Which path do I use?",
        ),
        heldout=("What route returns the whole catalogue of models with their prices?",),
    ),
    Fact(
        id="endpoint_key",
        kind="endpoint",
        value="/key",
        topic="the endpoint for information about the API key",
        answer="Information about the API key comes from GET `/key`.",
        train=(
            "Which endpoint gives information about my API key?",
            "Where do I check whether my API key is valid?",
            "Tell me the path for the limits of my key.",
            "How can I see the usage of the current API key?",
            "I want to test a credential. Which path do I use?",
        ),
        heldout=("What route should I GET to inspect the API key I am calling with?",),
    ),
    Fact(
        id="endpoint_generation",
        kind="endpoint",
        value="/generation",
        topic="the endpoint for the statistics of one generation",
        answer="The statistics of one generation come from GET `/generation`.",
        train=(
            "Which endpoint gives the statistics of one generation?",
            "Where do I look up the cost of a finished request?",
            "Tell me the path for the stats of a single generation.",
            "How can I fetch token counts and latency of an earlier completion?",
            "I have a generation id. Which path do I use to look it up?",
        ),
        heldout=("What route shows the stats of an earlier generation when I know its id?",),
    ),
    Fact(
        id="endpoint_credits",
        kind="endpoint",
        value="/credits",
        topic="the endpoint for the total credits and usage of the account",
        answer="Total credits and total usage come from GET `/credits`.",
        train=(
            "Which endpoint shows my total credits?",
            "Where do I see how many credits the account has?",
            "Tell me the path for total credits and total usage.",
            "How can I fetch the balance of my account?",
            "I want to know the credits that I bought. Which path do I use?",
        ),
        heldout=("What route reports `total_credits` next to `total_usage`?",),
    ),
    Fact(
        id="endpoint_responses",
        kind="endpoint",
        value="/responses",
        topic="the endpoint in the style of OpenAI Responses",
        answer="The OpenAI Responses style is served at POST `/responses`.",
        train=(
            "Which endpoint speaks the OpenAI Responses format?",
            "Where do I send requests in the OpenAI Responses style?",
            "Tell me the path of the Responses API.",
            "How can I use OpenAI's Responses format here?",
            "My client speaks OpenAI Responses. Which path do I use?",
        ),
        heldout=("What route is made for software written against the OpenAI Responses API?",),
    ),
    Fact(
        id="endpoint_messages",
        kind="endpoint",
        value="/messages",
        topic="the endpoint in the style of Anthropic Messages",
        answer="The Anthropic Messages style is served at POST `/messages`.",
        train=(
            "Which endpoint speaks the Anthropic Messages format?",
            "Where do I send requests in the Anthropic style?",
            "Tell me the path of the Anthropic Messages API.",
            "How can I use the Anthropic format here?",
            "My client speaks Anthropic Messages. Which path do I use?",
        ),
        heldout=("What route is made for software written with the Anthropic SDK?",),
    ),
)

HEADERS = (
    Fact(
        id="header_generation_id",
        kind="header",
        value="X-Generation-Id",
        topic="the response header with the generation id",
        answer="The generation id is in the response header `X-Generation-Id`.",
        train=(
            "Which response header carries the generation id?",
            "Where in the headers do I find the id of my generation?",
            "Tell me the header with the generation id.",
            "I want to log the generation id without parsing the body. Which header has it?",
            "What header names the generation on every response?",
        ),
        heldout=(
            "Without reading the JSON, from what header can I take the id of the generation?",
        ),
    ),
    Fact(
        id="header_retry_after",
        kind="header",
        value="Retry-After",
        topic="the header that says how long to wait",
        answer="How long to wait is in the header `Retry-After`.",
        train=(
            "Which header says how long to wait after a 429?",
            "How many seconds should I wait when I am rate limited, and which header has it?",
            "Tell me the header with the waiting time.",
            "I got a 503. Which header says when I may try again?",
            "What header holds the seconds until the next attempt?",
        ),
        heldout=("After being throttled, from what header do I read the seconds to pause?",),
    ),
    Fact(
        id="header_title",
        kind="header",
        value="X-OpenRouter-Title",
        topic="the header behind the alias `X-Title`",
        answer="`X-Title` is an alias of the header `X-OpenRouter-Title`.",
        train=(
            "Which header is `X-Title` an alias of?",
            "What is the full name of the header `X-Title`?",
            "Tell me the main name of X-Title.",
            "I send `X-Title`. Which header does it stand for?",
            "`X-Title` is only an alias. What is the real header?",
        ),
        heldout=("Our code sends `X-Title`. By what header name should we replace that alias?",),
    ),
    Fact(
        id="header_cache",
        kind="header",
        value="X-OpenRouter-Cache",
        topic="the header that turns on the response cache",
        answer="The response cache is turned on with the header `X-OpenRouter-Cache`.",
        train=(
            "Which header turns on the response cache?",
            "How do I enable response caching?",
            "Tell me the header for caching whole responses.",
            "I want identical requests answered from the cache. Which header do I send?",
            "What header do I set to true to cache responses?",
        ),
        heldout=("With what request header do I opt in to response caching?",),
    ),
    Fact(
        id="header_metadata",
        kind="header",
        value="X-OpenRouter-Metadata",
        topic="the header that asks for `openrouter_metadata`",
        answer="`openrouter_metadata` is asked for with the header `X-OpenRouter-Metadata`.",
        train=(
            "Which header do I send to get `openrouter_metadata`?",
            "How do I ask for routing metadata in the response?",
            "Tell me the header that enables openrouter_metadata.",
            "I want to see how my request was routed. Which header do I send?",
            "What header do I set to `enabled` for routing metadata?",
        ),
        heldout=("`openrouter_metadata` is missing from my result: what header must I add?",),
    ),
)

ENUMS = (
    Fact(
        id="enum_tool_calls",
        kind="enum",
        value="tool_calls",
        topic="the `finish_reason` when the model calls a tool",
        answer="When the model calls a tool the `finish_reason` is `tool_calls`.",
        train=(
            "Which `finish_reason` do I get when the model calls a tool?",
            "What does finish_reason say if a function is called?",
            "The model wants to use my tool. Which `finish_reason` shows that?",
            "Tell me the finish_reason of a turn that calls a function.",
            "How do I see in `finish_reason` that a tool was called?",
        ),
        heldout=("The model decided to run one of my functions: to what is `finish_reason` set?",),
    ),
    Fact(
        id="enum_json_schema",
        kind="enum",
        value="json_schema",
        topic="the `response_format` type for answers that follow a schema",
        answer="For answers that follow a schema set `response_format` to type `json_schema`.",
        train=(
            "Which `response_format` type makes the answer follow my schema?",
            "How do I get structured output with a fixed schema?",
            "I have a schema for the answer. Which type of `response_format` do I set?",
            "Tell me the response_format type for a schema.",
            "What type of `response_format` takes a schema?",
        ),
        heldout=(
            "My output has to match a given schema. What `type` goes into `response_format`?",
        ),
    ),
    Fact(
        id="enum_deny",
        kind="enum",
        value="deny",
        topic="the value of `data_collection` that forbids collecting data",
        answer="To forbid collecting data set `provider.data_collection` to `deny`.",
        train=(
            "Which value of `data_collection` forbids collecting data?",
            "How do I set `data_collection` so that providers do not collect my data?",
            "I do not want my data collected. What do I put into `provider.data_collection`?",
            "Tell me the opposite of `allow` in data_collection.",
            "What is the strict setting of `data_collection`?",
        ),
        heldout=(
            "`provider.data_collection` is at `allow`; what else can it be, for more privacy?",
        ),
    ),
    Fact(
        id="enum_context_compression",
        kind="enum",
        value="context-compression",
        topic="the plugin that shortens prompts that are too long",
        answer="Prompts that are too long are shortened by the plugin `context-compression`.",
        train=(
            "Which plugin shortens prompts that are too long?",
            "How do I make a long prompt fit the context window, and with which plugin?",
            "Tell me the plugin that cuts the middle out of a prompt.",
            "I want prompts trimmed automatically. Which plugin id do I send?",
            "What plugin replaces `transforms` with middle-out?",
        ),
        heldout=("When the chat outgrows the window, what plugin drops the middle of it for me?",),
    ),
    Fact(
        id="enum_response_healing",
        kind="enum",
        value="response-healing",
        topic="the plugin that repairs broken JSON answers",
        answer="Broken JSON answers are repaired by the plugin `response-healing`.",
        train=(
            "Which plugin repairs broken JSON answers?",
            "How do I get invalid JSON from the model fixed automatically?",
            "Tell me the plugin that fixes trailing commas and missing brackets.",
            "I want malformed JSON output repaired. Which plugin id do I send?",
            "What plugin removes code fences around JSON?",
        ),
        heldout=("The model's JSON has missing brackets. What plugin mends that?",),
    ),
    Fact(
        id="enum_ephemeral",
        kind="enum",
        value="ephemeral",
        topic="the type of `cache_control`",
        answer="The type of `cache_control` is `ephemeral`.",
        train=(
            "Which type does `cache_control` have?",
            "What do I put into the type of cache_control?",
            "Tell me the value of `cache_control.type`.",
            "I want to mark a text part with `cache_control`. Which type do I write?",
            "cache_control type?",
        ),
        heldout=(
            "Setting `cache_control` on a part of a prompt, what `type` string belongs there?",
        ),
    ),
    Fact(
        id="enum_done",
        kind="enum",
        value="[DONE]",
        topic="the last data line of a chat stream",
        answer="A chat stream ends with the data line `[DONE]`.",
        train=(
            "Which data line ends a chat stream?",
            "How do I know that the stream is over?",
            "Tell me the last line of a streamed answer.",
            "I read server-sent events. Which marker says that no more come?",
            "What does the API send at the end of a stream?",
        ),
        heldout=("My reader loops over stream events: what final marker should make it stop?",),
    ),
    Fact(
        id="enum_event_stream",
        kind="enum",
        value="text/event-stream",
        topic="the content type of a stream",
        answer="A stream has the content type `text/event-stream`.",
        train=(
            "Which content type does a stream have?",
            "What is the `Content-Type` of a streamed response?",
            "Tell me the media type of a streamed answer.",
            "I set `stream` to true. Which Content-Type comes back?",
            "What content type do I have to expect when streaming?",
        ),
        heldout=("My proxy must recognise streamed replies. What `Content-Type` marks them?",),
    ),
)

PREFIXES = (
    Fact(
        id="prefix_generation",
        kind="prefix",
        value="gen-",
        topic="the prefix of generation ids",
        answer="Generation ids start with `gen-`.",
        train=(
            "Which prefix do generation ids have?",
            "What does a generation id start with?",
            "Tell me the beginning of every generation id.",
            "I want to recognise generation ids. How do they begin?",
            "Prefix of a generation id?",
        ),
        heldout=("By what first characters can a regular expression spot a generation id?",),
    ),
    Fact(
        id="prefix_key",
        kind="prefix",
        value="sk-or-v1-",
        topic="the prefix of API keys",
        answer="API keys start with `sk-or-v1-`.",
        train=(
            "Which prefix do API keys have?",
            "What does an OpenRouter API key start with?",
            "Tell me the beginning of every API key.",
            "I want to recognise API keys. How do they begin?",
            "Prefix of an API key?",
        ),
        heldout=("Our secret scanner looks for OpenRouter keys: what first characters mark them?",),
    ),
)

FACTS = (
    *DEFAULTS,
    *BOUNDS,
    *COUNTS,
    *STATUSES,
    *ERRORS,
    *FIELDS,
    *ENDPOINTS,
    *HEADERS,
    *ENUMS,
    *PREFIXES,
)
