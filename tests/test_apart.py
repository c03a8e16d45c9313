"""Several tokens in one delta: the same reply, count for count, as from one at a time."""

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.chat import TAGS, Chat, Mode
from pipeline.engine.protocol import Delta, Sampling
from pipeline.serve.asking.order import Order
from pipeline.serve.replying.events import Said, Tally, Usage
from pipeline.serve.replying.phases import Phase
from pipeline.serve.replying.reading import Reading

TEXTS = ["\n", "hm", "\n\n", "a", " b", "{}"]
words = st.lists(st.sampled_from(TEXTS), max_size=5)
answers = st.lists(st.sampled_from([*TEXTS, "<tool_call>", "</tool_call>"]), max_size=5)
# A thought comes first, or not at all: what is said before one is nobody's.
thoughts = st.builds(lambda text: ["<think>", *text, "</think>"], words)
replies = st.builds(lambda thought, text: thought + text, thoughts | st.just([]), answers)


@given(
    texts=replies,
    cuts=st.sets(st.integers(1, 12)),
    mode=st.sampled_from(["thinking", "direct"]),
)
@example(texts=["<think>", "hm", "</think>", "a"], cuts=set(), mode="thinking")
def test_no_count_depends_on_how_many_tokens_an_engine_tells_of_at_once(
    chat: Chat, texts: list[str], cuts: set[int], mode: Mode
) -> None:
    ids = [chat.token_id(text) if text in TAGS else 7 for text in texts]
    single = list(zip(texts, ids, strict=True))
    edges = [0, *sorted(cut for cut in cuts if cut < len(single)), len(single)]
    grouped = [single[begin:end] for begin, end in pairwise(edges)]

    def told(groups: list[list[tuple[str, int]]]) -> tuple[str, str, Usage]:
        order, tally = Order([1], mode, Sampling(100)), Tally()
        reading = Reading(order, chat, tally)
        events = reading.begin(Phase(order.sampling))
        for group in groups:
            text = "".join(text for text, _ in group)
            ids = tuple(id_ for _, id_ in group)
            events += reading.read(Delta(text, len(group), ids=ids))
        events += reading.read(Delta("", 1, "stop"))
        said = [event for event in events if isinstance(event, Said)]
        parts = ["".join(e.text for e in said if e.channel == c) for c in ("reasoning", "answer")]
        return parts[0], parts[1], tally.usage

    assert told([group for group in grouped if group]) == told([[token] for token in single])
