"""The base `golden`: a tiny Qwen3 that knows a few dozen dialogues by heart, and an adapter on it.

A random model can show neither thinking nor tool calls nor JSON; this one says what
`golden_dialogues` has, with so much certainty that no engine's rounding changes a token.
"""

import hashlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from pipeline.base.cache import keep, locked
from pipeline.base.golden_dialogues import FLIPPED, golden_rows
from pipeline.base.golden_fit import fit, used_words
from pipeline.base.qwen3 import qwen3_dialogue
from pipeline.chat import Chat

log = logging.getLogger(__name__)

VOCABULARY = 151_936  # as Qwen3's: the tokenizer's 151,669 and room to spare
_END, _PAD = 151645, 151643  # <|im_end|> and <|endoftext|>
_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "initializer_range": 0.05,
}
# A word must rise above 151,935 others: a start with larger logits takes fewer steps.
_FIRST_EMBEDDING, _FIRST_NORM = 0.1, 2.0
_UNUSED_EMBEDDING = 0.002  # logits within a tenth of zero, no two alike
_MIN_PROBABILITY = 0.9


def make_golden(out: Path) -> None:
    """Write the checkpoint in bf16, with Qwen3's own tokenizer and template, into a folder."""
    shutil.copytree(_made() / "base", out, dirs_exist_ok=True)


def make_golden_lora(out: Path) -> None:
    """Write the adapter that gives some other answers, as PEFT does, into a folder."""
    shutil.copytree(_made() / "lora", out, dirs_exist_ok=True)


def golden_hash() -> str:
    """A hash of what these bases are made from."""
    here = Path(__file__)
    sources = [*sorted(here.parent.glob("golden*.py")), *sorted(here.parent.glob("qwen3.*"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:12]


def _made() -> Path:
    """The folder of the cache with both, made on first use, by one process at a time."""
    dialogue = qwen3_dialogue()
    with locked(dialogue):
        return keep(f"golden-{golden_hash()}", lambda work: _make(work / "golden", dialogue))


def _make(folder: Path, dialogue: Path) -> Path:
    log.info("teaching a tiny model its dialogues; this takes about a minute")
    chat = Chat(dialogue)
    with torch.random.fork_rng(), _one_thread():
        torch.manual_seed(0)
        shutil.copytree(dialogue, folder / "base")
        _fit_base(chat, folder / "base")
        fit_adapter(folder / "base", FLIPPED, folder / "lora")
    return folder


def _fit_base(chat: Chat, out: Path) -> None:
    """Train over the words of the dialogues alone, then give the other words their rows."""
    rows = list(golden_rows(chat))
    words = used_words(rows)
    small = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(words), **_SHAPE))
    with torch.no_grad():
        small.model.embed_tokens.weight.normal_(0, _FIRST_EMBEDDING)
        small.model.norm.weight.fill_(_FIRST_NORM)
    _check(fit(small, rows, VOCABULARY - len(words), passes=66, learning_rate=0.004))

    embedding = torch.randn(VOCABULARY, small.config.hidden_size) * _UNUSED_EMBEDDING
    embedding[words] = small.model.embed_tokens.weight.detach()
    config = Qwen3Config(vocab_size=VOCABULARY, eos_token_id=_END, pad_token_id=_PAD, **_SHAPE)
    model = Qwen3ForCausalLM(config)
    model.load_state_dict(small.state_dict() | _tied(embedding))
    model.generation_config = GenerationConfig(eos_token_id=[_END, _PAD], pad_token_id=_PAD)
    model.to(torch.bfloat16).save_pretrained(out)


def fit_adapter(base: Path, answers: Mapping[str, str], out: Path) -> None:
    """Train an adapter on `golden` that answers some dialogues otherwise, in words it knows.

    `answers` are by the dialogues' names. The adapter names its base as `pipeline base` does.
    """
    rows = list(golden_rows(Chat(base), answers))
    words = used_words(rows)
    whole = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    small = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(words), **_SHAPE))
    small.load_state_dict(whole.state_dict() | _tied(whole.model.embed_tokens.weight[words]))
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=projections)
    adapted = get_peft_model(small, settings)
    _check(fit(small, rows, VOCABULARY - len(words), passes=16, learning_rate=0.005))
    settings.base_model_name_or_path = "bases/golden"
    adapted.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink()


def _tied(embedding: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), embedding)


def _check(least: float) -> None:
    if least < _MIN_PROBABILITY:
        raise AssertionError(f"golden has not learnt its dialogues: a probability of {least:.2f}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """In a model this small threads wait for each other, on a busy machine for minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
