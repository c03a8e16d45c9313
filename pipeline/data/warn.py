"""What in a data report a user should look at before training."""

from typing import Any

from pipeline.errors import GateMissed


def warnings_of(report: dict[str, Any], thinking: str) -> list[str]:
    """A sentence for each thing that is probably not meant; `thinking` is the recipe's word."""
    noted, train = report["noted"], report["train"]
    duplicates, overlap = report["duplicates"], report["overlap"]
    num_secrets = sum(found["count"] for found in report["secrets"].values())
    # A direct answer after /no_think is trained in thinking mode, with an empty block.
    num_thinking = train.get("thinking_rows", 0) - noted.get("switched_no_think", 0)
    forgets = thinking != "never" and num_thinking <= 0
    candidates = [
        (noted.get("invalid"), "conversations dropped as invalid: {}"),
        (noted.get("overlong"), "rows dropped, longer than data.max_tokens: {}"),
        (noted.get("stray_tags"), "answers with a literal tag of the dialogue in their text: {}"),
        (noted.get("names"), "messages with a name, which the template has no place for: {}"),
        (duplicates["exact"], "conversations that are copies of others: {}"),
        (duplicates["near"], "conversations that are nearly the same as others: {}"),
        (overlap["exact"], "held-out conversations that are also trained on: {}"),
        (overlap["near"], "held-out conversations nearly the same as trained ones: {}"),
        (num_secrets, "suspected secrets, which a model may repeat: {}"),
        (
            forgets and train["rows"] - train.get("text_rows", 0),
            "no row in thinking mode, so the model may forget how to think (mix in what `pipeline "
            "replay` writes, or set data.thinking=never); rows: {}",
        ),
    ]
    return [sentence.format(f"{number:,}") for number, sentence in candidates if number]


def refuse_warnings(report: dict[str, Any]) -> None:
    """Raise GateMissed if there are any; the rows are on disk all the same."""
    if report["warnings"]:
        raise GateMissed(f"--strict: {'; '.join(report['warnings'])}")
