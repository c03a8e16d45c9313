"""Which of a run's files is served, by its certificate, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest

from pipeline.errors import GateMissed, PipelineError, RunError
from pipeline.recipe import GgufFormat
from pipeline.run import Run
from pipeline.serve.offer.artefact import find_artefact
from pipeline.serve.offer.choice import Choice, Chosen, choose, refuse_uncertified

LORA, BASE = "adapter/a-lora.gguf", "adapter/base-bf16.gguf"


@pytest.fixture
def exports(tmp_path: Path, chat_folder: Path) -> Path:
    """A run's exports with three formats and the adapter for llama.cpp."""
    folder = tmp_path / "runs" / "mine" / "exports"
    shutil.copytree(chat_folder, folder)
    shutil.copytree(chat_folder, folder / "adapter")
    for name in ("a-bf16.gguf", "a-q8_0.gguf", "a-q4_k_m.gguf", LORA, BASE):
        (folder / name).touch()
    return folder


def certify(exports: Path, recommended: str = "merged", **passed: bool) -> None:
    artefacts = {
        kind: {"mean_kl": 0.5, "max_mean_kl": 0.01, "passed": fine} for kind, fine in passed.items()
    }
    certificate = {"artefacts": artefacts, "recommended": recommended}
    text = json.dumps(certificate | {"passed": all(passed.values())})
    (exports.parent / "certificate.json").write_text(text)


def chosen(exports: Path, choice: Choice = "auto") -> list[str]:
    """Names of the files that are served: they are there, and no certificate speaks against it."""
    found = choose(exports, choice)
    refuse_uncertified(exports, found)
    return [str(file.relative_to(exports)) for file in (found.gguf, found.adapter) if file]


def test_the_adapter_is_served_over_its_base_where_the_certificate_says_so(exports: Path) -> None:
    assert chosen(exports) == ["a-q8_0.gguf"]
    certify(exports, "adapter", merged=True, q8_0=True, adapter_gguf=True)

    assert chosen(exports) == [BASE, LORA]
    assert "a-lora.gguf, for the certificate recommends the adapter" in choose(exports, "auto").why
    assert chosen(exports, "merged") == ["a-q8_0.gguf"]
    certify(exports, "merged", merged=True, q8_0=True, adapter_gguf=True)
    assert chosen(exports) == ["a-q8_0.gguf"]
    assert choose(exports, "auto").why == ""
    assert chosen(exports, "adapter") == [BASE, LORA]


@pytest.mark.parametrize(
    ("known", "removed", "said"),
    [
        ({"adapter_gguf": True}, LORA, "it is not among the exports"),
        ({"adapter_gguf": True}, BASE, "it is not among the exports"),
        ({"adapter_gguf": False}, "", "as GGUF it is not certified"),
        ({}, "", "as GGUF it is not certified"),
    ],
)
def test_a_recommended_adapter_that_cannot_be_served_is_said_and_the_merged_one_served(
    exports: Path, known: dict[str, bool], removed: str, said: str
) -> None:
    certify(exports, "adapter", merged=True, q8_0=True, **known)
    if removed:
        (exports / removed).unlink()

    assert chosen(exports) == ["a-q8_0.gguf"]
    assert said in choose(exports, "auto").why


def test_what_did_not_pass_is_passed_over_in_the_usual_order(exports: Path) -> None:
    certify(exports, q8_0=False, bf16=True, q4_k_m=True)
    assert chosen(exports) == ["a-bf16.gguf"]
    assert choose(exports, "auto").why == "serving bf16, for q8_0 did not pass"
    certify(exports, q8_0=False, bf16=False, q4_k_m=True)
    assert chosen(exports) == ["a-q4_k_m.gguf"]
    certify(exports, q8_0=False, bf16=False, q4_k_m=False)
    with pytest.raises(GateMissed, match="not certified: q8_0"):
        chosen(exports)


def test_every_format_a_recipe_may_name_can_be_chosen(exports: Path) -> None:
    for word in get_args(GgufFormat):
        (exports / f"a-{word}.gguf").touch()
    assert {word: chosen(exports, word) for word in get_args(GgufFormat)} == {
        word: [f"a-{word}.gguf"] for word in get_args(GgufFormat)
    }


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("q6_k", "has no q6_k to serve: set q6_k in export.gguf"),
        ("adapter", "export.adapter: gguf"),
    ],
)
def test_what_is_not_there_is_said_with_what_to_do(
    exports: Path, choice: Choice, said: str
) -> None:
    shutil.rmtree(exports / "adapter")
    with pytest.raises(PipelineError, match=said):
        choose(exports, choice)


@pytest.mark.parametrize("choice", ["q4_k_m", "adapter"])
def test_a_word_for_what_is_not_certified_is_refused(exports: Path, choice: Choice) -> None:
    certify(exports, merged=True, q8_0=True)
    with pytest.raises(PipelineError, match="is not certified: run `pipeline certify` again"):
        choose(exports, choice)
    certify(exports, merged=True, q4_k_m=False, adapter_gguf=False)
    with pytest.raises(GateMissed, match="not certified"):
        chosen(exports, choice)


def test_a_file_the_certificate_has_no_word_for_is_as_good_as_the_merged_one(exports: Path) -> None:
    certify(exports, merged=False, bf16=True)
    for unknown in (Chosen(exports / "a-q4_k_m.gguf"), Chosen(exports / "own.gguf"), Chosen(None)):
        with pytest.raises(GateMissed, match="merged"):
            refuse_uncertified(exports, unknown)
    certify(exports, bf16=True)
    refuse_uncertified(exports, Chosen(exports / "own.gguf"))


def test_the_folder_of_an_adapter_is_never_served_as_its_base_alone(exports: Path) -> None:
    artefact = find_artefact(exports / "adapter")
    assert (artefact.name, artefact.chosen.adapter) == ("mine", exports / LORA)
    with pytest.raises(PipelineError, match="is an adapter: give its run folder"):
        find_artefact(exports / LORA)
    certify(exports, adapter_gguf=False)
    with pytest.raises(GateMissed, match="adapter_gguf"):
        refuse_uncertified(artefact.folder, artefact.chosen)
    with pytest.raises(PipelineError, match="--artefact q8_0 chooses in a run folder"):
        find_artefact(exports / "a-q8_0.gguf", "q8_0")


def test_a_certificate_of_older_exports_is_refused_until_certified_again(exports: Path) -> None:
    run = Run(exports.parent)
    certify(exports, merged=True, q8_0=True, bf16=True)
    run.record("export", {}, [run.exports])
    with pytest.raises(RunError, match=r"certificate\.json is not of the exports as they are now"):
        chosen(exports)
    run.record("certify", {"exports": run.made("export")}, [run.certificate])
    assert chosen(exports) == ["a-q8_0.gguf"]

    (exports / "a-q8_0.gguf").write_bytes(b"made again")
    run.record("export", {}, [run.exports])

    for choice in get_args(Choice)[:2]:
        with pytest.raises(RunError, match="run `pipeline certify` again"):
            chosen(exports, choice)
    run.forget("export")
    with pytest.raises(RunError, match="run `pipeline certify` again"):
        chosen(exports)


def test_files_from_elsewhere_are_held_to_no_certificate(exports: Path, tmp_path: Path) -> None:
    certify(exports, merged=False, q8_0=False)
    copied: Any = shutil.copytree(exports, exports.parent / "copies")
    assert chosen(copied) == ["a-q8_0.gguf"]
