"""A Modelfile, with which Ollama serves a GGUF file: `ollama create NAME -f Modelfile`."""

from pathlib import Path

from pipeline.run import read_json

MAX_CONTEXT = 40_960
"""Ollama reserves memory for num_ctx tokens at once; this is Qwen3's context without YaRN."""
# What Qwen recommends for thinking mode, Ollama's default; greedy thinking runs in circles.
_SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0, "repeat_penalty": 1}
_STOPS = ("<|im_end|>", "<|endoftext|>")


def write_modelfile(checkpoint: Path, gguf: str, out: Path) -> None:
    """Write a Modelfile for a GGUF file beside it, made from a checkpoint with Qwen3's dialogue."""
    context = min(read_json(checkpoint / "config.json")["max_position_embeddings"], MAX_CONTEXT)
    template = Path(__file__).with_name("qwen3.gotmpl").read_text(encoding="utf-8")
    parameters = {"num_ctx": context} | _SAMPLING
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{template.rstrip()}"""']
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    lines += [f'PARAMETER stop "{stop}"' for stop in _STOPS]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def has_qwen3_dialogue(template: str) -> bool:
    """Whether a chat template is Qwen3's kind, with both modes, which qwen3.gotmpl renders."""
    return "<|im_start|>" in template and "enable_thinking" in template
