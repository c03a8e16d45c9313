"""The content log's files: whose they are, how long they stay, what a full disk does to them."""

import datetime
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Pipeline
from sqlalchemy import make_url

from pipeline.errors import PipelineError, RecipeError
from pipeline.serve.content.files import ContentFiles, content_folder, read_lines
from pipeline.serve.content.log import open_content_log
from pipeline.serve.content.redaction import find_redaction
from pipeline.serve.offer.menu import ContentLogging, read_menu

DAY_S = 24 * 60 * 60
NOON_S = 1_767_268_800  # 2026-01-01T12:00:00Z
FULL = """
import resource, sys
from pathlib import Path
from pipeline.serve.content.files import ContentFiles
files = ContentFiles(Path(sys.argv[1]), 1, 10**9)
files.append(0, b'{"id": "first"}\\n')
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
try:
    files.append(0, b'{"id": "too long", "x": "' + bytes(1000) + b'"}\\n')
except OSError as error:
    print(error.strerror)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
files.append(0, b'{"id": "last"}\\n')
"""


class Clock:
    """Since the epoch."""

    def __init__(self) -> None:
        self.now_s = NOON_S

    def __call__(self) -> float:
        return self.now_s


def entry(name: object, num_bytes: int = 0) -> bytes:
    return json.dumps({"id": name, "x": "x" * num_bytes}).encode() + b"\n"


def names(folder: Path) -> list[object]:
    return [line["id"] for line in read_lines(folder)]


def days(folder: Path) -> list[str]:
    return sorted(file.name.partition(".")[0] for file in folder.iterdir())


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "books.sqlite.content"
    ContentFiles(folder, 1, 2**20).append(NOON_S * 1000, entry("a"))

    (file,) = folder.iterdir()

    assert folder.stat().st_mode & 0o777 == 0o700
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.name.startswith("2026-01-01.")


def test_it_lies_beside_the_books_and_each_books_have_their_own(tmp_path: Path) -> None:
    file = content_folder(make_url(f"sqlite:///{tmp_path}/books.sqlite"))
    servers = [content_folder(make_url(f"postgresql://u:p@host/{name}")) for name in "ab"]

    assert file == tmp_path / "books.sqlite.content"
    assert servers[0] != servers[1]
    assert all("p@" not in str(folder) for folder in servers)


def test_an_entry_goes_to_its_own_day_whenever_it_is_written(tmp_path: Path) -> None:
    files = ContentFiles(tmp_path, 1, 2**20, Clock())
    midnight_ms = (NOON_S + DAY_S // 2) * 1000
    for name, created_ms in (("a", midnight_ms - 1), ("b", midnight_ms), ("c", midnight_ms - 2)):
        files.append(created_ms, entry(name))

    assert days(tmp_path) == ["2026-01-01", "2026-01-02"]
    assert names(tmp_path) == ["a", "c", "b"]
    assert list(read_lines(tmp_path, datetime.date(2026, 1, 2))) == [{"id": "b", "x": ""}]
    assert files.find("c", midnight_ms - 2) == {"id": "c", "x": ""}
    assert files.find("c", midnight_ms) is None


def test_two_processes_write_files_of_their_own(tmp_path: Path) -> None:
    one, other = (ContentFiles(tmp_path, 1, 2**20, Clock()) for _ in "ab")
    for number in range(10):
        (one if number % 2 else other).append(NOON_S * 1000, entry(number))

    assert len(list(tmp_path.iterdir())) == 2
    assert set(names(tmp_path)) == set(range(10))
    assert one.find("x", NOON_S * 1000) is None


def test_a_file_that_is_full_is_followed_by_another_and_the_oldest_go(tmp_path: Path) -> None:
    files = ContentFiles(tmp_path, 1, 80_000, Clock())  # files of 10,000 bytes
    for number in range(100):
        files.append(NOON_S * 1000, entry(number, 1980))
        sizes = [file.stat().st_size for file in tmp_path.iterdir()]
        assert max(sizes) <= 10_000
        assert sum(sizes) <= 80_000

    kept = names(tmp_path)

    assert len(kept) >= 25, "more goes than must"
    assert kept == list(range(100 - len(kept), 100))


def test_days_that_are_too_old_go(tmp_path: Path) -> None:
    clock = Clock()
    files = ContentFiles(tmp_path, 2, 2**20, clock)
    for day in range(4):
        clock.now_s = NOON_S + day * DAY_S
        files.append(clock.now_s * 1000, entry(day))

    assert days(tmp_path) == ["2026-01-02", "2026-01-03", "2026-01-04"]
    clock.now_s += DAY_S
    assert files.sweep() == 1
    assert days(tmp_path) == ["2026-01-03", "2026-01-04"]


def test_what_was_swept_away_is_written_anew(tmp_path: Path) -> None:
    files = ContentFiles(tmp_path / "content", 1, 2**20, Clock())
    files.append(NOON_S * 1000, entry("a"))
    for file in files.folder.iterdir():
        file.unlink()
    files.folder.rmdir()
    files.append(NOON_S * 1000, entry("b"))

    assert names(files.folder) == ["b"]


def test_a_server_deletes_what_is_too_old_as_soon_as_it_starts(tmp_path: Path) -> None:
    books = make_url(f"sqlite:///{tmp_path}/books.sqlite")
    ContentFiles(content_folder(books), 1, 2**20).append(0, entry("old"))
    old = list(content_folder(books).iterdir())

    with open_content_log(ContentLogging(keep_days=1), books):
        pass

    assert [file.name[:10] for file in old] == ["1970-01-01"]
    assert list(content_folder(books).iterdir()) == []


def test_a_line_that_a_full_disk_has_cut_is_taken_back(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)

    (file,) = tmp_path.iterdir()

    assert said.stdout == "File too large\n"
    assert file.read_bytes() == b'{"id": "first"}\n{"id": "last"}\n'


def test_a_line_that_was_cut_when_its_process_was_killed_is_none(tmp_path: Path) -> None:
    files = ContentFiles(tmp_path, 1, 2**20, Clock())
    files.append(NOON_S * 1000, entry("a"))
    files.append(NOON_S * 1000, b'{"id": "b", "x')

    assert names(tmp_path) == ["a"]
    assert files.find("b", NOON_S * 1000) is None


def test_a_redaction_is_a_function_of_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    Path("of_mine.py").write_text("def hide(line):\n    return {'kept': line}\nnumber = 1\n")
    Path("colorsys.py").write_text("raise SystemError('this is no library')")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    Path("broken.py").write_text("import nothing_of_the_kind")

    assert find_redaction("of_mine:hide")({"a": 1}) == {"kept": {"a": 1}}
    assert find_redaction("colorsys:rgb_to_hls")(0, 0, 0) == (0, 0, 0)
    for name, words in {
        "of_mine:nothing": "content.redact: of_mine has no function nothing",
        "of_mine:number": "content.redact: of_mine has no function number",
        "not_there:hide": f"content.redact: not_there cannot be imported from {tmp_path}: "
        "ModuleNotFoundError: No module named 'not_there'",
        "broken:hide": f"content.redact: broken cannot be imported from {tmp_path}: "
        "ModuleNotFoundError: No module named 'nothing_of_the_kind'",
    }.items():
        with pytest.raises(PipelineError) as refused:
            find_redaction(name)
        assert str(refused.value) == words


def test_a_server_whose_redaction_is_missing_does_not_start(
    tmp_path: Path, chat_folder: Path, monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline
) -> None:
    monkeypatch.chdir(tmp_path)
    model = f"{{urls: ['http://127.0.0.1:9'], tokenizer: {chat_folder}}}"
    Path("serve.yaml").write_text(f"models: [{model}]\ncontent: {{redact: 'gone:hide'}}\n")

    said = pipeline("serve", "serve.yaml", "--port", "0", "--books", str(tmp_path))

    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: content.redact: gone cannot be imported from ")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("{keep_days: 0}", "content.keep_days"),
        ("{max_bytes: 1000}", "content.max_bytes"),
        ("{redact: hide}", "content.redact"),
        ("{redact: 'os;rm:x'}", "content.redact"),
        ("{keep: 1}", "content.keep"),
    ],
)
def test_a_rule_that_makes_no_sense_is_named(rules: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(f"models: [{{gguf: a.gguf}}]\ncontent: {rules}\n")

    with pytest.raises(RecipeError, match=words):
        read_menu(path)
