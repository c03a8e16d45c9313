"""Bases that are made here: written once, whole, and loadable by transformers."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.base import demo, names, random, wheels
from pipeline.base.checkpoint import INDEX, read_layout, read_tensor
from pipeline.base.dialogue import BLOCK_TOKENS
from pipeline.base.make import make_base
from pipeline.errors import BaseError, RunError


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.fixture
def small_shape(monkeypatch: pytest.MonkeyPatch) -> str:
    """A shape small enough to write in a moment, cut into several shards and blocks."""
    monkeypatch.setitem(names.SHAPES, "small", (16, 24, 2, 8, False))
    monkeypatch.setattr(random, "_SHARD_BYTES", 6 << 20)
    monkeypatch.setattr(random, "_BLOCK_VALUES", 1 << 20)
    return "small"


def test_tiny_is_made_once_and_left_alone_while_it_stands(tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    assert make_base("tiny", "", out)
    before = stamps(out)
    assert not make_base("tiny", "", out)
    assert stamps(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_tiny_is_made_again_alike_where_a_file_was_harmed_or_lost(tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    make_base("tiny", "", out)
    weights = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert make_base("tiny", "", out)
    assert (out / "model.safetensors").read_bytes() == weights
    (out / "config.json").unlink()
    assert make_base("tiny", "", out)
    assert not make_base("tiny", "", out)


def test_a_base_of_another_kind_takes_the_place_of_one_made_here(
    tmp_path: Path, small_shape: str
) -> None:
    make_base("tiny", "", tmp_path / "base")
    assert make_base("random", small_shape, tmp_path / "base")
    assert (tmp_path / "base" / INDEX).is_file()


def test_a_folder_that_was_not_made_here_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BaseError, match="was not made by `pipeline base`; choose another --out"):
        make_base("tiny", "", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_full_disk_leaves_nothing_of_a_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shape: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(random, "write_shard", full)
    with pytest.raises(RunError, match=r"the disk is full; .* was not written, free some space"):
        make_base("random", small_shape, tmp_path / "base")
    assert not list(tmp_path.iterdir())


def test_tiny_speaks_qwen3s_dialogue_in_transformers(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hé?\0"}], add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.decode(text) == "<|im_start|>user\nHé?\0<|im_end|>\n<|im_start|>assistant\n"
    assert max(text) < model.config.vocab_size
    assert torch.isfinite(model(torch.tensor([text])).logits).all()


def test_random_has_the_asked_shape_in_shards_that_transformers_loads(
    tmp_path: Path, small_shape: str
) -> None:
    out = tmp_path / "base"
    make_base("random", small_shape, out)
    layout = read_layout(out)
    tensors = {tensor.name: tensor for shard in layout.values() for tensor in shard}
    index = json.loads((out / INDEX).read_text())

    assert len(layout) > 1
    assert list(layout) == sorted(path.name for path in out.glob("*.safetensors"))
    assert index["weight_map"] == {name: tensor.shard.name for name, tensor in tensors.items()}
    assert index["metadata"]["total_size"] == sum(t.num_bytes for t in tensors.values())

    model = AutoModelForCausalLM.from_pretrained(out)
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (16, 2)
    assert model.config.rope_parameters["rope_theta"] == 1_000_000.0
    weights = model.state_dict()
    assert weights.keys() == tensors.keys()
    for name, values in weights.items():
        assert values.dtype == torch.bfloat16
        assert torch.equal(values, read_tensor(tensors[name]))
        if name.endswith("norm.weight"):
            assert torch.equal(values, torch.ones_like(values))
        elif values.numel() > 10_000:
            assert values.float().std() == pytest.approx(0.02, rel=0.05)


def test_random_with_tied_embeddings_stores_them_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(names.SHAPES, "tied", (16, 24, 1, 8, True))
    make_base("random", "tied", tmp_path / "base")
    tensors = {t.name for shard in read_layout(tmp_path / "base").values() for t in shard}
    assert "lm_head.weight" not in tensors
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_random_is_the_same_every_time(tmp_path: Path, small_shape: str) -> None:
    hashes = []
    for name in ("one", "two"):
        make_base("random", small_shape, tmp_path / name)
        hashes.append(json.loads((tmp_path / name / "base.json").read_text())["sha256"])
    assert hashes[0] == hashes[1]


def test_a_shape_nobody_knows_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match=r"^there is no shape 'qwen3-9b'; known: qwen3-0\.6b, .*$"):
        make_base("random", "qwen3-9b", tmp_path / "base")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def parcel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[wheels.Wheel, list[Path]]:
    """A wheel of one file that the package index gives, and the list of its deliveries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    delivered: list[Path] = []

    def deliver(wheel: wheels.Wheel, folder: Path) -> Path:
        file = folder / f"{wheel.name}-{wheel.version}-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(zipfile.ZipInfo("parcel/gift.txt"), "a gift")
        delivered.append(file)
        return file

    monkeypatch.setattr(wheels, "_download", deliver)
    file = deliver(wheels.Wheel("parcel", "1", ""), tmp_path)
    delivered.clear()
    return wheels.Wheel("parcel", "1", hashlib.sha256(file.read_bytes()).hexdigest()), delivered


def test_a_wheel_is_fetched_and_unpacked_once(
    parcel: tuple[wheels.Wheel, list[Path]], tmp_path: Path
) -> None:
    wheel, delivered = parcel
    folder = wheels.unpacked(wheel)
    assert folder == tmp_path / "cache" / "pipeline" / "parcel-1"
    assert (folder / "parcel" / "gift.txt").read_text() == "a gift"
    assert wheels.unpacked(wheel) == folder
    assert len(delivered) == 1
    assert list(folder.parent.iterdir()) == [folder]


def test_a_wheel_another_process_has_unpacked_meanwhile_is_used(
    parcel: tuple[wheels.Wheel, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, delivered = parcel
    deliver = wheels._download

    def deliver_late(wheel: wheels.Wheel, work: Path) -> Path:
        theirs = work.parent / "parcel-1" / "parcel"
        theirs.mkdir(parents=True)
        (theirs / "gift.txt").write_text("their gift")
        return deliver(wheel, work)

    monkeypatch.setattr(wheels, "_download", deliver_late)
    folder = wheels.unpacked(wheel)
    assert len(delivered) == 1
    assert (folder / "parcel" / "gift.txt").read_text() == "their gift"
    assert list(folder.parent.iterdir()) == [folder]


def test_a_wheel_that_cannot_be_put_in_its_place_is_not_taken_for_one(
    parcel: tuple[wheels.Wheel, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space left"):
        wheels.unpacked(parcel[0])


def test_a_wheel_of_other_bytes_is_refused_and_nothing_of_it_stays(
    parcel: tuple[wheels.Wheel, list[Path]], tmp_path: Path
) -> None:
    wheel, delivered = parcel
    other = wheels.Wheel(wheel.name, wheel.version, "0" * 64)
    with pytest.raises(BaseError, match=f"has sha256 {wheel.sha256}, not 0{{64}}"):
        wheels.unpacked(other)
    assert len(delivered) == 1
    assert not list((tmp_path / "cache" / "pipeline").iterdir())


def test_a_wheel_the_package_index_does_not_give_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(BaseError, match="parcel==1 could not be fetched from the package index: "):
        wheels.unpacked(wheels.Wheel("parcel", "1", "0" * 64))
    assert not list((tmp_path / "pipeline").iterdir())


def test_the_demo_bases_unused_tokens_become_qwen3s_visible_blocks(tmp_path: Path) -> None:
    specials = [f"<special_{number}>" for number in range(demo._FIRST_BLOCK_ID + 6)]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*specials, *letters]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in specials])
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    pieces = demo._rename_block_tokens(tmp_path / "tokenizer.json")

    renamed = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [renamed.id_to_token(token_id) for token_id in pieces] == list(BLOCK_TOKENS)
    assert renamed.get_vocab_size() == len(vocabulary)
    for (token_id, spelt), name in zip(pieces.items(), BLOCK_TOKENS, strict=True):
        assert renamed.encode(f"a{name}b").ids[1:-1] == [token_id]
        assert renamed.decode([token_id], skip_special_tokens=True) == name
        assert "".join(tokenizer.id_to_token(piece) for piece in spelt) == name
    assert len(renamed.encode("2026").ids) == 4


def test_dialogue_files_come_with_every_base(tiny_base: Path) -> None:
    assert all((tiny_base / name).is_file() for name in ("tokenizer.json", "chat_template.jinja"))


def test_a_kind_of_one_shape_does_not_mind_the_shape_that_is_asked(tmp_path: Path) -> None:
    assert make_base("tiny", "qwen3-8b", tmp_path / "tiny")
    assert not make_base("tiny", "another", tmp_path / "tiny")


@pytest.mark.parametrize("base", ["Qwen/Qwen3-8B", "random:qwen3-8b"])
def test_a_base_that_can_be_fetched_or_made_is_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    monkeypatch.chdir(tmp_path)
    names.check_base(base)


def test_a_checkpoints_folder_is_fine(tiny_base: Path) -> None:
    names.check_base(str(tiny_base))


@pytest.mark.parametrize(
    ("base", "sentence"),
    [
        ("bases/demo", "there is no base bases/demo: no such folder; make one with"),
        ("qwen3", "there is no base qwen3: no such folder; make one with"),
        ("random:qwen3-9b", "there is no shape 'qwen3-9b'; known: qwen3-0.6b, qwen3-1.7b"),
        ("random:../x", "there is no shape '../x'"),
        (".", ". is not a checkpoint: config.json is missing"),
    ],
)
def test_a_base_that_can_be_nowhere_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseError) as caught:
        names.check_base(base)
    assert str(caught.value).startswith(sentence)


def test_a_random_base_that_is_half_made_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = names.random_folder("random:qwen3-8b")
    assert folder == Path("bases/random-qwen3-8b")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(BaseError, match=r"is not a checkpoint: tokenizer\.json is missing"):
        names.check_base("random:qwen3-8b")


def test_a_base_is_checked_without_the_hubs_client_and_torch() -> None:
    heavy = {"huggingface_hub", "httpx2", "torch", "transformers"}
    program = f"import sys, pipeline.base.names; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_base_of_nothing_but_pickles_is_refused_before_training(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "pytorch_model.bin"):
        (tmp_path / name).write_text("{}")

    with pytest.raises(BaseError, match="holds pickled weights"):
        names.check_base(str(tmp_path))
    (tmp_path / "model.safetensors").write_text("")  # a training_args.bin may lie beside it
    names.check_base(str(tmp_path))
