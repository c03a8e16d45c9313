"""An adapter says which base it is for in words that hold on other machines, too."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pipeline.run import Run, write_json
from pipeline.train.save import save

COMMIT = "8f3ad7d4"
FETCHED = {"base_named": {"base": "Qwen/Qwen3-8B", "revision": None}, "base_commit": COMMIT}


@pytest.mark.parametrize(
    ("named", "facts", "said"),
    [
        ("Qwen/Qwen3-8B", FETCHED, ("Qwen/Qwen3-8B", COMMIT)),
        ("bases/demo", {}, ("bases/demo", None)),
        ("bases/demo", FETCHED, ("bases/demo", None)),
        ("/home/somebody/bases/mine", {}, ("mine", None)),
        (None, {}, ("tiny", None)),
    ],
)
def test_it_is_the_recipes_word_and_the_hubs_commit(
    tiny_base: Path, tmp_path: Path, named: str | None, facts: dict[str, Any], said: tuple[str, str]
) -> None:
    run = Run(tmp_path / "run")
    if named is not None:
        write_json(run.recipe, {"base": named})
    run.describe(**facts)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))

    save(adapted, tiny_base, run)

    config = json.loads((run.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["revision"]) == said
    assert adapted.peft_config["default"].base_model_name_or_path == str(tiny_base), "unchanged"
