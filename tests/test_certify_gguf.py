"""What llama.cpp says of a GGUF file, and what a certificate makes of that."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_adapter
from transformers import AutoModelForCausalLM

from pipeline.certify.gguf import TOP, ask_gguf
from pipeline.certify.greedy import answer
from pipeline.certify.measure import HeldOut, compare_likeliest, logits_of
from pipeline.certify.model import Trained
from pipeline.certify.stage import certify
from pipeline.certify.verdict import refuse_if_missed
from pipeline.chat import Chat
from pipeline.errors import GateMissed
from pipeline.export import export_gguf
from pipeline.export.lora import write_lora
from pipeline.merge import merge
from pipeline.recipe import Certify, Merge, MinTop1
from pipeline.run import BASE_GGUF


@pytest.fixture(scope="module")
def rows(chat: Chat) -> list[HeldOut]:
    """Characters of several tokens, control tokens, and the same beginning twice."""
    texts = {
        "Grüße aus 日本 😀<|im_end|>": "direct",
        "Grüße an alle<|im_end|>": "direct",
        "<think>\nWell, 1 + 1?\n</think>\n\n2<|im_end|>": "thinking",
    }
    # So long that what is left of it in an engine's cache was not computed as it is computed anew.
    question = "Hello, how are the shops today? " * 4
    prompt = chat.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    return [(prompt, chat.encode(text), mode) for text, mode in texts.items()]  # type: ignore[misc]


def load(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def test_llama_cpp_says_of_every_token_what_transformers_does_whatever_was_asked_before(
    tiny_base: Path, tiny_gguf: Path, rows: list[HeldOut], tmp_path: Path
) -> None:
    model = load(tiny_base)
    (own,) = answer(model, rows[:1], 6)
    other = (own[0], [*own[1][:2], (own[1][2] + 1) % 256, *own[1][3:]], own[2])

    said = ask_gguf(tiny_gguf, [*rows, rows[0]], [own, other], tmp_path / "log")
    again = ask_gguf(tiny_gguf, rows[::-1], [], tmp_path / "log")

    for row, tokens in zip(rows, said.likeliest, strict=False):
        assert [len(position) for position in tokens] == [TOP] * len(row[1])
        found = compare_likeliest(logits_of(model, row), tokens, row[1])
        assert found.kl.max() < 1e-5
        assert found.largest.max() < 0.05
    assert said.likeliest[0] == said.likeliest[3]
    assert said.likeliest[:3] == again.likeliest[::-1]
    assert said.agreed == [6, 2]


def settings() -> Certify:
    # random weights hardly prefer a token to others
    lenient = MinTop1(**dict.fromkeys(MinTop1.model_fields, 0.8))
    return Certify(gguf_positions=50, greedy_prompts=2, greedy_tokens=4, min_top1=lenient)


def test_a_gguf_file_of_the_merge_passes_and_one_of_the_base_does_not(
    tiny_base: Path, tiny_gguf: Path, rows: list[HeldOut], tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", b_scale=0.05)
    merge(tiny_base, adapter, tmp_path / "merged")
    export_gguf(tmp_path / "merged", tmp_path / "exports", "mine", ["q8_0"])
    files = {
        "merged": tmp_path / "merged",
        "q8_0": tmp_path / "exports" / "mine-q8_0.gguf",
        "bf16": tiny_gguf,
    }
    trained, log = Trained(tiny_base, adapter, "lora"), tmp_path / "log"
    certificate = certify(trained, files, rows, settings(), log, Merge())
    passed = {name: artefact["passed"] for name, artefact in certificate["artefacts"].items()}
    assert passed == {"merged": True, "adapter": True, "q8_0": True, "bf16": False}
    assert certificate["artefacts"]["q8_0"]["positions"] == 50
    assert certificate["artefacts"]["bf16"]["effect"] < 0.2
    with pytest.raises(GateMissed, match="not certified: bf16: effect preserved "):
        refuse_if_missed(certificate)


def test_both_modes_are_asked_of_a_gguf_file_however_long_the_rows_of_one_are(
    tiny_base: Path, tiny_gguf: Path, rows: list[HeldOut], tmp_path: Path
) -> None:
    """And each position is held against its own, though rows between them are left out."""
    adapter = make_adapter(tiny_base, tmp_path / "none", b_scale=0)
    long, _, other = rows
    short: HeldOut = (other[0], other[1][:3], other[2])
    wanted = settings().model_copy(update={"gguf_positions": 12})
    trained, log = Trained(tiny_base, adapter, "lora"), tmp_path / "log"
    mixed = [long, long, *[short] * 4]
    artefact = certify(trained, {"bf16": tiny_gguf}, mixed, wanted, log)["artefacts"]["bf16"]
    counts = {mode: found["positions"] for mode, found in artefact["by_mode"].items()}
    assert counts == {"direct": 6, "thinking": 6}
    assert artefact["max_kl"] < 1e-5


def test_an_adapter_as_gguf_is_certified_over_its_base_as_gguf(
    tiny_base: Path, tiny_gguf: Path, rows: list[HeldOut], tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", b_scale=0.05)
    other = make_adapter(tiny_base, tmp_path / "other", b_scale=0.05, seed=1)
    (tmp_path / BASE_GGUF).symlink_to(tiny_gguf)
    for name, folder in (("mine", adapter), ("other", other)):
        write_lora(folder, tiny_base, tmp_path / f"{name}-lora.gguf")

    def measure(name: str) -> Any:
        files = {"adapter_gguf": tmp_path / f"{name}-lora.gguf"}
        trained, log = Trained(tiny_base, adapter, "lora"), tmp_path / "log"
        return certify(trained, files, rows, settings(), log)["artefacts"]["adapter_gguf"]

    assert measure("mine")["passed"]
    assert measure("mine")["effect"] > 0.99
    assert not measure("other")["passed"]
