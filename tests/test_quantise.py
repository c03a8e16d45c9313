"""K-quants: llama.cpp's own bytes, in llama.cpp's own mixes, which its engine loads."""

import asyncio
import ctypes
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xllamacpp
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize

from pipeline.engine.llamacpp import LlamaCpp
from pipeline.errors import RunError
from pipeline.export.mix import MIXES, Model, choose_type
from pipeline.export.quantise import quantise

LAYER = {
    "attn_q.weight": (4096, 4096),
    "attn_k.weight": (1024, 4096),
    "attn_v.weight": (1024, 4096),
    "attn_output.weight": (4096, 4096),
    "ffn_gate.weight": (12288, 4096),
    "ffn_up.weight": (12288, 4096),
    "ffn_down.weight": (4096, 12288),
    "attn_norm.weight": (4096,),
    "ffn_norm.weight": (4096,),
}


def mixed(gguf_format: str, num_layers: int, is_tied: bool = False) -> Counter[str]:
    """How many tensors of a model of 4096 values a row are stored in which type."""
    shapes = {f"blk.{i}.{name}": LAYER[name] for i in range(num_layers) for name in LAYER}
    shapes |= {"token_embd.weight": (50_000, 4096), "output_norm.weight": (4096,)}
    if not is_tied:
        shapes["output.weight"] = (50_000, 4096)
    model = Model(num_layers, is_tied)
    types = [choose_type(n, shape, MIXES[gguf_format], model) for n, shape in shapes.items()]
    return Counter(kind.name for kind in types if kind is not None)


def test_the_mixes_are_those_of_the_files_people_publish() -> None:
    # What llama.cpp prints when it loads Llama 3 8B (32 layers) and Qwen3 8B (36 layers).
    assert mixed("q4_k_m", 32) == {"Q4_K": 193, "Q6_K": 33}
    assert mixed("q5_k_m", 32) == {"Q5_K": 193, "Q6_K": 33}
    assert mixed("q6_k", 32) == {"Q6_K": 226}
    assert mixed("q4_k_m", 36) == {"Q4_K": 217, "Q6_K": 37}


def test_the_layers_with_more_bits_are_the_outer_ones_and_every_third() -> None:
    mix, model = MIXES["q4_k_m"], Model(32, is_tied=False)
    more = [
        layer
        for layer in range(32)
        if choose_type(f"blk.{layer}.ffn_down.weight", (4096, 14336), mix, model)
        == GGMLQuantizationType.Q6_K
    ]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


def test_embeddings_that_are_the_output_layer_too_are_stored_as_it_is() -> None:
    assert mixed("q4_k_m", 32, is_tied=True) == {"Q4_K": 192, "Q6_K": 33}


@pytest.mark.parametrize(
    ("gguf_format", "row", "kind"),
    [
        ("q4_k_m", 576, "Q5_0"),
        ("q5_k_m", 576, "Q5_1"),
        ("q6_k", 576, "Q8_0"),
        ("q4_k_m", 768, "Q4_K"),
        ("q4_k_m", 40, "F16"),
    ],
)
def test_rows_of_no_whole_number_of_blocks_get_llama_cpps_next_type(
    gguf_format: str, row: int, kind: str
) -> None:
    found = choose_type("blk.9.attn_q.weight", (64, row), MIXES[gguf_format], Model(32, False))
    assert found == GGMLQuantizationType[kind]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of one layer in 16 bits, with rows of 256 and of 64 values."""
    file = tmp_path / "source.gguf"
    writer = GGUFWriter(file, "qwen3")
    writer.add_block_count(1)
    writer.add_name("näme")
    writer.add_token_list(["a", "<b>"])
    random = np.random.default_rng(0)
    for name, shape in {"attn_v": (6, 512), "attn_q": (6, 512), "attn_k": (6, 64)}.items():
        values = random.normal(0, 0.02, shape).astype(np.float16)
        writer.add_tensor(f"blk.0.{name}.weight", values)
    writer.add_tensor("output.weight", random.normal(0, 1, (6, 256)).astype(np.float16))
    writer.add_tensor("output_norm.weight", random.normal(0, 1, 256).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def llama_cpps_bytes(values: np.ndarray, kind: GGMLQuantizationType, num_bytes: int) -> bytes:
    """The same rows by the engine's own code."""
    engine = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    out = ctypes.create_string_buffer(num_bytes)
    sizes = [ctypes.c_int64(size) for size in (0, *values.shape)]
    rows = np.ascontiguousarray(values, np.float32)
    engine.ggml_quantize_chunk(int(kind), rows.ctypes.data_as(ctypes.c_void_p), out, *sizes, None)
    return out.raw


@pytest.mark.parametrize("gguf_format", MIXES)
def test_every_tensor_holds_the_bytes_llama_cpp_would_write(
    weights: Path, tmp_path: Path, gguf_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.export.quantise._BLOCK_VALUES", 1024)  # several blocks a tensor
    quantise(weights, tmp_path / "out.gguf", gguf_format)

    before, after = GGUFReader(weights), GGUFReader(tmp_path / "out.gguf")
    assert [tensor.name for tensor in after.tensors] == [tensor.name for tensor in before.tensors]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert list(new.shape) == list(old.shape)
        expected = old.data.tobytes()
        if new.tensor_type != old.tensor_type:
            expected = llama_cpps_bytes(old.data, new.tensor_type, new.data.nbytes)
        assert new.data.tobytes() == expected, new.name
    kinds = {t.name: t.tensor_type.name for t in after.tensors}
    assert kinds["output.weight"] == kinds["blk.0.attn_v.weight"] == "Q6_K"
    assert kinds["blk.0.attn_q.weight"] == MIXES[gguf_format].type.name
    assert kinds["output_norm.weight"] == "F32"


def test_what_the_file_says_is_kept_and_the_format_added(weights: Path, tmp_path: Path) -> None:
    quantise(weights, tmp_path / "out.gguf", "q5_k_m")

    before, after = (
        {f.name: f.contents() for f in GGUFReader(file).fields.values() if "GGUF." not in f.name}
        for file in (weights, tmp_path / "out.gguf")
    )
    assert after == before | {"general.file_type": 17, "general.quantization_version": 2}


def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "source.gguf", "qwen3")
    writer.add_block_count(1)
    writer.add_tensor("output.weight", np.full((2, 256), np.inf, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(RunError, match=r"output\.weight holds values that are not finite"):
        quantise(tmp_path / "source.gguf", tmp_path / "out.gguf", "q4_k_m")


def test_llama_cpp_loads_the_file_and_answers_nearly_as_before(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tiny-q4_k_m.gguf"
    quantise(tiny_gguf, file, "q4_k_m")

    for old, new in zip(GGUFReader(tiny_gguf).tensors, GGUFReader(file).tensors, strict=True):
        exact, stored = (dequantize(t.data, t.tensor_type) for t in (old, new))
        assert np.abs(stored - exact).max() <= np.abs(exact).max() / 15, new.name  # 5 bits

    async def ask(gguf: Path) -> dict[int, float]:
        log = tmp_path / "engine.log"
        async with await LlamaCpp.start(gguf, slots=1, context_tokens=64, log=log) as engine:
            return await engine.next_token_logprobs([72, 101, 108, 108, 111], 300)

    exact, found = asyncio.run(ask(tiny_gguf)), asyncio.run(ask(file))
    common = exact.keys() & found.keys()
    assert len(common) > 250
    assert 0 < max(abs(exact[token] - found[token]) for token in common) < 0.1
