"""Counts and histograms of one part of the data."""

from collections import Counter

from pipeline.data.conversation import Conversation
from pipeline.data.rows import PairRow, Row

LONGEST = ("longest_row", "longest_pair")


class Tally:
    """What the rows of the training or of the held-out part add up to."""

    def __init__(self) -> None:
        """Nothing counted yet."""
        self.counts: Counter[str] = Counter()
        self.histograms: dict[str, Counter[int]] = {
            name: Counter()
            for name in ("prompt_tokens", "supervised_tokens", "row_tokens", "turns")
        }

    def add_conversation(self, conversation: Conversation, copies: int) -> None:
        """Count a conversation that is trained so many times."""
        answers = [m for m in conversation.messages if m["role"] == "assistant"]
        self.counts["tool_calls"] += copies * sum(len(m.get("tool_calls") or ()) for m in answers)
        self.histograms["turns"][len(answers)] += copies

    def add_row(self, row: Row, copies: int, has_tools: bool) -> None:
        """Count a row that is trained so many times."""
        prompt, completion = len(row.prompt_ids), len(row.completion_ids)
        # A plain text's first token follows nothing.
        supervised = completion if prompt else completion - 1
        self.counts["rows"] += copies
        self.counts[f"{row.mode}_rows"] += copies
        self.counts["rows_with_tools"] += copies * has_tools
        self.counts["prompt_tokens"] += copies * prompt
        self.counts["supervised_tokens"] += copies * supervised
        self.counts["longest_row"] = max(self.counts["longest_row"], prompt + completion)
        sizes = {
            "prompt_tokens": prompt,
            "supervised_tokens": supervised,
            "row_tokens": prompt + completion,
        }
        for name, size in sizes.items():
            self.histograms[name][1 << max(size - 1, 0).bit_length()] += copies

    def add_pair(self, pair: PairRow, copies: int) -> None:
        """Count a pair that is trained so many times: two rows, of which a tree shares the prompt.

        All but the prompt's last token, that is; and the longest pair is counted as such a tree.
        """
        prompt, supervised = len(pair.prompt_ids), len(pair.chosen_ids) + len(pair.rejected_ids)
        self.counts["pairs"] += copies
        self.counts["pair_tokens"] += copies * (2 * prompt + supervised)
        self.counts["shared_pair_tokens"] += copies * (prompt + 1 + supervised)
        self.counts["supervised_pair_tokens"] += copies * supervised
        longest = max(self.counts["longest_pair"], prompt + 1 + supervised)
        self.counts["longest_pair"] = longest

    def include(self, other: "Tally") -> None:
        """Add another part's counts to these."""
        longest = {key: max(self.counts[key], other.counts[key]) for key in LONGEST}
        self.counts += other.counts
        for key, tokens in longest.items():
            self.counts[key] = tokens
        for name, histogram in other.histograms.items():
            self.histograms[name] += histogram

    def report(self) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
        """Counts, and the histograms from the smallest value up."""
        histograms = {
            name: {str(value): histogram[value] for value in sorted(histogram)}
            for name, histogram in self.histograms.items()
        }
        always = dict.fromkeys(("rows", "prompt_tokens", "supervised_tokens", "longest_row"), 0)
        return always | {key: count for key, count in self.counts.items() if count}, histograms
