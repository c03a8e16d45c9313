"""Data sets on a hub as sources: against a small server that speaks the hub's own routes."""

import gzip
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Pipeline, conversation
from fake_hub import COMMIT, OLDER, TOKEN, Hub, point_client, serving
from huggingface_hub import HfFileSystem, constants

from pipeline.data.hub import Pinned, fetch, pin
from pipeline.errors import DataError
from pipeline.recipe import Source
from pipeline.run import Run, read_json

ROW = b'{"text": "hello"}\n'
CONFIGS = b"""---
license: cc0-1.0
configs:
- config_name: chat
  data_files:
  - split: train
    path: [chat/*.jsonl, chat/more/*.jsonl.gz]
  - split: held
    path: chat/held.jsonl
- config_name: code
  data_dir: code
---
# Talk
"""
CONFIGURED = {
    "README.md": CONFIGS,
    "chat/b.jsonl": ROW,
    "chat/a.jsonl": ROW,
    "chat/held.jsonl": ROW,
    "chat/more/c.jsonl.gz": gzip.compress(ROW),
    "code/train.csv": b"text\nhello\n",
    "code/test.csv": b"text\nhello\n",
    "train.jsonl": b"no subset's",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the data set `acme/talk` in two commits, and a client with an empty cache."""
    newer = {"train.jsonl": ROW * 2, "test.jsonl": ROW, "README.md": b"# Talk", "LICENSE.txt": b""}
    files = {COMMIT: newer, OLDER: newer | {"train.jsonl": ROW}}
    with serving(Hub("acme/talk", files, kind="datasets")) as running:
        point_client(monkeypatch, running.url, tmp_path / "cache")
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", running.url)  # read once, too
        yield running
    HfFileSystem.clear_instance_cache()


def talk(
    subset: str | None = None, split: str | None = None, revision: str | None = None
) -> Source:
    said = {"subset": subset, "split": split, "revision": revision}
    return Source.model_validate(
        {"hub": "acme/talk"} | {key: value for key, value in said.items() if value}
    )


def refused(source: Source, pinned: Pinned | None = None) -> str:
    """The sentence a source is refused with: one line, and no secret in it."""
    with pytest.raises(DataError) as caught:
        fetch(source, pinned) if pinned else pin(source)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 400
    assert TOKEN not in sentence
    return sentence


def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


def parquet(text: str) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": [text]}), file)
    return file.getvalue()


def readme(configs: str) -> bytes:
    return f"---\nconfigs: {configs}\n---\n".encode()


def test_a_split_is_known_by_the_names_of_its_files_and_no_other_file_is_fetched(hub: Hub) -> None:
    pinned = pin(talk())
    assert pinned == {"commit": COMMIT, "files": ["train.jsonl"]}
    assert not any(asked.endswith(".jsonl") for asked in hub.asked), "pinned without the data"
    assert [path.read_bytes() for path in fetch(talk(), pinned)] == [ROW * 2]
    assert pin(talk(split="test"))["files"] == ["test.jsonl"]
    assert not any("test.jsonl" in asked for asked in hub.asked)


@pytest.mark.parametrize(
    ("source", "files"),
    [
        (talk("chat"), ["chat/a.jsonl", "chat/b.jsonl", "chat/held.jsonl", "chat/more/c.jsonl.gz"]),
        (talk("chat", "held"), ["chat/held.jsonl"]),
        (talk("code"), ["code/train.csv"]),
        (talk("code", "test"), ["code/test.csv"]),
    ],
)
def test_subsets_and_splits_are_those_of_the_readmes_metadata(
    hub: Hub, source: Source, files: list[str]
) -> None:
    hub.files[COMMIT] = CONFIGURED
    assert pin(source)["files"] == files


def test_a_subset_that_is_said_to_be_the_default_is_taken_where_none_is_named(hub: Hub) -> None:
    said = CONFIGS.replace(b"  data_dir: code", b"  data_dir: code\n  default: true")
    hub.files[COMMIT] = CONFIGURED | {"README.md": said}
    assert pin(talk())["files"] == ["code/train.csv"]


def test_a_subset_may_be_called_by_a_number(hub: Hub) -> None:
    hub.files[COMMIT]["README.md"] = readme("[{config_name: 2024, data_files: test.jsonl}]")
    assert pin(talk("2024"))["files"] == pin(talk())["files"] == ["test.jsonl"]


def test_files_in_folders_named_after_splits_keep_their_order_and_their_bytes(hub: Hub) -> None:
    held = {
        "b/train/1.jsonl.gz": gzip.compress(ROW),
        "a/train/2.jsonl": ROW,
        "a/train/10.jsonl": ROW * 2,
        "a/test/1.jsonl": b"",
    }
    hub.files[COMMIT] = held
    pinned = pin(talk())
    assert pinned["files"] == ["a/train/10.jsonl", "a/train/2.jsonl", "b/train/1.jsonl.gz"]
    found = fetch(talk(), pinned)
    assert [path.read_bytes() for path in found] == [held[name] for name in pinned["files"]]
    assert [path.name for path in found] == ["10.jsonl", "2.jsonl", "1.jsonl.gz"]


def test_shards_of_parquet_are_found_and_read(hub: Hub) -> None:
    shards = [f"data/train-0000{number}-of-00002.parquet" for number in (0, 1)]
    hub.files[COMMIT] = {name: parquet(name) for name in shards} | {
        "data/test-00000-of-00001.parquet": parquet("test"),
        "extra.jsonl": ROW,
    }
    found = fetch(talk(), pin(talk()))
    assert [pq.read_table(path)["text"].to_pylist() for path in found] == [[n] for n in shards]


def test_a_file_that_two_patterns_find_is_taken_once(hub: Hub) -> None:
    hub.files[COMMIT] = {"train-my-train.jsonl": ROW}
    assert pin(talk())["files"] == ["train-my-train.jsonl"]


def test_files_of_other_kinds_beside_the_data_are_left_out(hub: Hub) -> None:
    hub.files[COMMIT] = {"talk.json": b"[]", "LICENSE.txt": b"", "a.zip": b"", "b.zip": b""}
    assert pin(talk())["files"] == ["talk.json"]


def test_a_branch_that_moves_leaves_a_pinned_source_where_it_was(hub: Hub) -> None:
    hub.refs["main"] = OLDER
    pinned = pin(talk())
    hub.refs["main"] = COMMIT
    assert pinned["commit"] == OLDER
    assert [path.read_bytes() for path in fetch(talk(), pinned)] == [ROW]
    assert pin(talk())["commit"] == COMMIT
    assert pin(talk(revision="v1")) == pinned
    assert pin(talk(revision=OLDER)) == pinned


def test_the_files_are_those_there_were_at_the_revision(hub: Hub) -> None:
    hub.files[OLDER] = {"older/train.jsonl": ROW, "README.md": b""}
    assert pin(talk(revision="v1")) == {"commit": OLDER, "files": ["older/train.jsonl"]}


def test_what_was_fetched_is_found_again_without_the_hub_from_a_pin_that_was_json(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = json.loads(json.dumps(pin(talk())))
    found = fetch(talk(), pinned)
    hub.asked.clear()
    assert fetch(talk(), pinned) == found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(talk(), pinned) == found
    assert hub.asked == []
    assert "HF_HUB_OFFLINE" in refused(talk())
    assert "HF_HUB_OFFLINE" in refused(talk(), {"commit": OLDER, "files": ["train.jsonl"]})


def test_a_pin_takes_few_requests_however_many_files_there_are(hub: Hub) -> None:
    hub.files[COMMIT] = {f"data/train-{number}.jsonl": ROW for number in range(200)}
    pin(talk())
    few = len(hub.asked)
    hub.files[COMMIT] |= {f"data/train-{number}.jsonl": ROW for number in range(200, 800)}
    hub.asked.clear()
    HfFileSystem.clear_instance_cache()
    assert len(pin(talk())["files"]) == 800
    assert len(hub.asked) <= few


def test_what_is_not_there_is_one_sentence_that_names_what_is(hub: Hub) -> None:
    assert refused(talk(split="dev")) == "acme/talk has no split dev; there is train, test"
    assert refused(talk("chat")) == "acme/talk has no subsets; leave subset chat out"
    assert refused(talk(revision="v9")) == "acme/talk has no revision v9"
    sentence = "the hub has no data set acme/none, or it is private: check the spelling"
    assert sentence in refused(Source(hub="acme/none"))
    assert "could not be fetched" in refused(Source(hub="acme/talk/train"))


def test_a_subset_that_is_not_there_is_one_sentence_that_names_those_that_are(hub: Hub) -> None:
    hub.files[COMMIT] = CONFIGURED
    assert refused(talk("chit")) == "acme/talk has no subset chit; there is chat, code"
    assert refused(talk()) == "acme/talk has several subsets; set subset to chat, code"
    assert refused(talk("code", "dev")) == "acme/talk has no split dev; there is train, test"
    assert refused(talk("chat", "dev")) == "acme/talk has no split dev; there is train, held"


def test_at_most_ten_names_are_told(hub: Hub) -> None:
    subsets = [{"config_name": f"s{number}", "data_files": "x.jsonl"} for number in range(13)]
    hub.files[COMMIT] = {"README.md": readme(json.dumps(subsets)), "x.jsonl": ROW}
    told = "s0, s1, s2, s3, s4, s5, s6, s7, s8, s9 and 3 more"
    assert refused(talk()) == f"acme/talk has several subsets; set subset to {told}"


@pytest.mark.parametrize("name", ["train.txt", "train.tar", "train.arrow", "train.zip", "x.tsv"])
def test_a_data_set_of_a_kind_that_is_not_read_is_refused_before_it_is_fetched(
    hub: Hub, name: str
) -> None:
    hub.files[COMMIT] = {name: b"what it is"}
    assert refused(talk()).startswith(f"acme/talk:train: {name} is of a kind that is not read; ")
    assert not any("/resolve/" in asked for asked in hub.asked)


def test_one_file_the_metadata_names_of_another_kind_refuses_them_all(hub: Hub) -> None:
    said = readme('[{config_name: a, data_files: ["train.jsonl", "more.txt"]}]')
    hub.files[COMMIT] |= {"README.md": said, "more.txt": b""}
    assert "more.txt is of a kind that is not read" in refused(talk())


def test_a_data_set_with_a_loading_script_is_refused(hub: Hub) -> None:
    hub.files[COMMIT]["talk.py"] = b"raise SystemExit"
    assert "acme/talk needs its own loading script talk.py" in refused(talk())


@pytest.mark.parametrize(
    "configs",
    [
        "5",
        "[chat]",
        "[5]",
        "[{config_name: a, data_files: 5}]",
        "[{config_name: a, data_files: [{split: no, path: x}]}]",
        "[{config_name: a, default: true}, {config_name: default}]",
        "{",
        f"[{'x' * 10_000}]",
    ],
)
def test_metadata_nobody_understands_is_one_sentence(hub: Hub, configs: str) -> None:
    hub.files[COMMIT]["README.md"] = readme(configs)
    assert "acme/talk: the metadata in its README.md is not valid: " in refused(talk())


@pytest.mark.parametrize("key", ["data_files", "data_dir"])
@pytest.mark.parametrize(
    "path",
    ["/{here}/*.jsonl", "https://example.com/*.jsonl", "s3://bucket", "x::file:///{here}", "../*"],
)
def test_metadata_cannot_reach_outside_the_data_set(
    hub: Hub, tmp_path: Path, key: str, path: str
) -> None:
    (tmp_path / "train.jsonl").write_bytes(ROW)
    said = path.format(here=str(tmp_path).removeprefix("/"))
    hub.files[COMMIT]["README.md"] = readme(f'[{{config_name: a, {key}: "{said}"}}]')
    sentence = "acme/talk:train: its metadata names files outside the data set"
    assert refused(talk()) == sentence


@pytest.mark.parametrize("files", [{}, {"README.md": b"# soon"}, {"notes": b""}])
def test_a_data_set_without_data_is_one_sentence(hub: Hub, files: dict[str, bytes]) -> None:
    hub.files[COMMIT] = files
    assert "acme/talk:train" in refused(talk())


@pytest.mark.parametrize("path", ["gone.jsonl", "gone/*.jsonl"])
def test_metadata_that_names_no_file_there_is_one_sentence(hub: Hub, path: str) -> None:
    hub.files[COMMIT]["README.md"] = readme(f"[{{config_name: a, data_files: {path}}}]")
    assert refused(talk()) == "acme/talk:train has no data files"


@pytest.mark.parametrize(
    ("status", "headers", "sentence"),
    [
        (404, {"X-Error-Code": "RepoNotFound"}, "the hub has no data set acme/talk, or it is"),
        (401, {"X-Error-Code": "RepoNotFound"}, "the hub has no data set acme/talk, or it is"),
        (401, {}, "the hub refuses access to acme/talk: set a valid HF_TOKEN"),
        (403, {"X-Error-Code": "GatedRepo"}, "acme/talk is gated: accept its terms and set HF_TOK"),
        (403, {"X-Error-Message": "No"}, "acme/talk could not be fetched from http://127.0.0.1"),
        (500, {}, "acme/talk could not be fetched from http://127.0.0.1"),
    ],
)
def test_a_hub_that_refuses_is_one_sentence_without_the_token(
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    headers: dict[str, str],
    sentence: str,
) -> None:
    without_pauses(monkeypatch)
    pinned = pin(talk())
    hub.refusal = (status, headers)
    assert sentence in refused(talk())
    assert sentence in refused(talk(), pinned)


def test_a_data_set_that_shows_its_names_but_gates_its_files_is_one_sentence(hub: Hub) -> None:
    hub.files[COMMIT].pop("README.md")
    hub.refusal, hub.refused = (401, {"X-Error-Code": "GatedRepo"}), "/resolve/"
    pinned = pin(talk())
    assert refused(talk(), pinned) == "acme/talk is gated: accept its terms and set HF_TOKEN"


def test_a_hub_that_fails_in_the_middle_of_a_pin_is_one_sentence(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pauses(monkeypatch)
    hub.refusal, hub.refused = (503, {}), "/tree/"
    assert "acme/talk could not be fetched from http://127.0.0.1" in refused(talk())


def test_an_endpoint_nobody_listens_at_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pauses(monkeypatch)
    point_client(monkeypatch, "http://127.0.0.1:9", tmp_path)
    assert "acme/talk could not be fetched from http://127.0.0.1:9: " in refused(talk())
    pinned: Pinned = {"commit": COMMIT, "files": ["train.jsonl"]}
    assert "acme/talk could not be fetched from http://127.0.0.1:9: " in refused(talk(), pinned)


def test_a_token_with_letters_no_token_has_is_one_sentence(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN + "é")
    assert "HF_TOKEN holds letters that no token has" in refused(talk())


def test_nothing_is_printed_where_nobody_watches(
    hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.files[COMMIT] = {f"data/train-{number}.jsonl": ROW for number in range(20)}
    fetch(talk(), pin(talk()))
    assert capfd.readouterr() == ("", "")


def test_datasets_is_not_imported_before_it_is_needed() -> None:
    said = "import sys, pipeline.data.hub; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", said], check=False).returncode == 0


def test_a_run_stays_with_the_commit_it_began_with(
    hub: Hub, workplace: Path, pipeline: Pipeline
) -> None:
    old, new = conversation("old?").encode(), conversation("new?").encode()
    hub.files = {OLDER: {"train.jsonl": old}, COMMIT: {"train.jsonl": new * 2, "test.jsonl": new}}
    hub.refs["main"] = OLDER
    recipe, run = workplace / "mine.yaml", Run.named("mine")
    recipe.write_text(recipe.read_text().replace("path: chats.jsonl", "hub: acme/talk"))

    first = pipeline("data", "mine.yaml")
    hub.refs["main"] = COMMIT
    hub.asked.clear()
    second = pipeline("data", "mine.yaml")
    asked = list(hub.asked)
    pins = run.facts()["hub_datasets"]
    recipe.write_text(
        recipe.read_text().replace("acme/talk}", "acme/talk}, {hub: acme/talk, split: test}")
    )
    third = pipeline("data", "mine.yaml")

    assert (first.code, first.err) == (second.code, second.err) == (third.code, third.err)
    assert first.code == 0
    assert second.out.startswith("data: nothing to do, ")
    assert asked == []
    assert pins == {"acme/talk:train": {"commit": OLDER, "files": ["train.jsonl"]}}
    assert run.facts()["hub_datasets"] == pins | {
        "acme/talk:test": {"commit": COMMIT, "files": ["test.jsonl"]}
    }
    assert read_json(run.data_report)["train"]["rows"] == 2


def test_another_pin_makes_the_rows_anew(hub: Hub, workplace: Path, pipeline: Pipeline) -> None:
    line = conversation("how much?").encode()
    hub.files = {OLDER: {"train.jsonl": line}, COMMIT: {"train.jsonl": line * 2}}
    hub.refs["main"] = OLDER
    recipe, run = workplace / "mine.yaml", Run.named("mine")
    recipe.write_text(recipe.read_text().replace("path: chats.jsonl", "hub: acme/talk"))
    pipeline("data", "mine.yaml")

    hub.refs["main"] = COMMIT
    run.describe(hub_datasets={})
    said = pipeline("data", "mine.yaml")

    assert said.out.startswith("data: acme/talk:train changed since it ran; running it again\n")
    assert read_json(run.data_report)["train"]["rows"] == 2
