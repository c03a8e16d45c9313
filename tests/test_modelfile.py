"""Ollama's Modelfile: what it says, and a Go template whose parts fit together."""

import json
import re
from pathlib import Path

import pytest

from pipeline.export.ollama import write_modelfile

BLOCK = re.compile(r"\{\{-?\s*(.*?)\s*-?\}\}", re.DOTALL)


@pytest.fixture
def modelfile(tiny_base: Path, tmp_path: Path) -> str:
    write_modelfile(tiny_base, "x-q8_0.gguf", tmp_path / "Modelfile")
    return (tmp_path / "Modelfile").read_text(encoding="utf-8")


def test_it_names_the_file_beside_it_both_stops_and_qwens_sampling(modelfile: str) -> None:
    head, template, rest = modelfile.split('"""')
    assert head == "FROM ./x-q8_0.gguf\nTEMPLATE "
    assert set(rest.split("\n")) - {""} == {
        "PARAMETER num_ctx 40960",
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 0.95",
        "PARAMETER top_k 20",
        "PARAMETER min_p 0",
        "PARAMETER repeat_penalty 1",
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|endoftext|>"',
    }
    assert template.startswith("{{-")
    assert template.endswith("{{- end }}"), "a line break would follow the generation prompt"


@pytest.mark.parametrize(("context", "said"), [(8192, 8192), (131_072, 40_960)])
def test_the_context_is_the_checkpoints_own_but_no_more_than_qwen3s(
    tmp_path: Path, context: int, said: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": context}))
    write_modelfile(tmp_path, "x.gguf", tmp_path / "Modelfile")
    assert f"PARAMETER num_ctx {said}\n" in (tmp_path / "Modelfile").read_text(encoding="utf-8")


def test_every_block_of_the_template_is_closed_and_every_brace_is_a_blocks(modelfile: str) -> None:
    template = modelfile.split('"""')[1]
    depth = 0
    for words in BLOCK.findall(template):
        depth += words.startswith(("if ", "range "))
        depth -= words == "end"
        assert depth >= 0
    assert depth == 0
    assert "{{" not in BLOCK.sub("", template)


def test_all_it_says_to_the_model_is_in_the_checkpoints_own_template(
    modelfile: str, tiny_base: Path
) -> None:
    official = (tiny_base / "chat_template.jinja").read_text(encoding="utf-8")
    official = official.replace("\\n", "\n").replace('\\"', '"')
    texts = BLOCK.sub("\0", modelfile.split('"""')[1]).split("\0")
    lines = {line for text in texts for line in text.splitlines() if line.strip()}
    # The roles are words there, a variable in the official one; a tool is one JSON value there.
    lines -= {"<|im_start|>user", "<|im_start|>assistant", '{"type": "function", "function": '}
    assert len(lines) > 10
    whole = [re.escape(line.strip("}")) + r"(?!\w)" for line in lines]
    assert not [line for line in whole if not re.search(line, official)]
