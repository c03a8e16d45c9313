"""Every shipped recipe, on the tiny base, from conversations to an answer over HTTP."""

import json
import sys
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.serve.ask import ask_both_modes

REPOSITORY = Path(__file__).parent.parent
RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))


@pytest.fixture
def workplace(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the data of the repository and bases/tiny, as the current directory."""
    (tmp_path / "data").symlink_to(REPOSITORY / "data")
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "tiny").symlink_to(tiny_base)
    monkeypatch.chdir(tmp_path)
    # The server of `ask` is a process of its own and must find the package from here.
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pipeline", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_goes_all_the_way(
    recipe: Path,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = ["--set", "base=bases/tiny", "--set", "train.steps=2"]
    for stage in ("check", "data", "plan", "train", "merge", "export", "certify"):
        assert run(monkeypatch, stage, str(recipe), *changes) == 0, capsys.readouterr().err

    folder = workplace / "runs" / recipe.stem
    certificate = json.loads((folder / "certificate.json").read_text())
    steps = (folder / "metrics.jsonl").read_text().splitlines()
    answers = list(ask_both_modes(folder, "What is the default of top_k?", ""))

    assert certificate["passed"]
    assert certificate["artefacts"]["merged"]["wrong_values"] == 0
    assert certificate["artefacts"].keys() == {"merged", "bf16", "q8_0"}
    assert len(steps) == 2
    assert [mode for mode, _, _ in answers] == ["thinking", "direct"]
    assert all(reasoning or answer for _, reasoning, answer in answers)

    capsys.readouterr()
    for stage in ("data", "train", "merge", "export", "certify"):
        assert run(monkeypatch, stage, str(folder)) == 0
        assert f"{stage}: nothing to do" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluation_asks_the_base_and_the_tuned_model_in_both_modes(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["base=bases/tiny", "train.steps=1", "evaluate.direct=6", "evaluate.thinking=3"]
    sets = [word for change in changes for word in ("--set", change)]
    for stage in ("data", "train", "merge", "export", "evaluate"):
        assert run(monkeypatch, stage, str(REPOSITORY / "recipes/demo.yaml"), *sets) == 0

    scores = json.loads((workplace / "runs/demo/evaluation.json").read_text())
    assert {when: s["direct"]["questions"] for when, s in scores.items()} == {
        "before": 6,
        "after": 6,
    }
    assert len(scores["after"]["thinking"]["answers"]) == 3
    assert "well-formed" in capsys.readouterr().out
