"""A wrong or incomplete LLM directory ends before anything starts, with one message that names file, value and fix."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mome_dist.config import load_config
from mome_dist.errors import UserError
from mome_dist.llm.directory import SINGLE, TensorIndex, check_directory, layer_tensors
from mome_dist.llm.hugging_face import load_hugging_face
from mome_dist.llm.shape import LLMShape, RopeScaling, unreadable
from mome_dist.preflight import validate
from tests import tiny_llms

ROPE = tiny_llms.LLAMA3_ROPE
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good directories: llama3 (one file), qwen2 (one file, tied), sharded (a Qwen2 in several files, untied)."""
    root = tmp_path_factory.mktemp("models")
    tiny_llms.save(tiny_llms.llama3(), root / "llama3")
    tiny_llms.save(tiny_llms.qwen2(tie_word_embeddings=True), root / "qwen2")
    tiny_llms.save(tiny_llms.qwen2(), root / "sharded", shard_size="20KB")
    return root


@pytest.mark.parametrize("name", ["llama3", "qwen2", "sharded"])
def test_good_directories_pass_and_every_tensor_is_asked_for(models: Path, name: str) -> None:
    shape, index = check_directory(models / name), TensorIndex(models / name)
    asked = {"model.embed_tokens.weight": (64, 32), "model.norm.weight": (32,), index.output_name(shape): (64, 32)}
    for layer in range(shape.layers):
        asked |= layer_tensors(shape, layer)
    stored: dict[str, torch.Tensor] = {}
    for file in (models / name).glob("*.safetensors"):
        stored |= load_file(file)
    assert asked == {tensor: tuple(value.shape) for tensor, value in stored.items()}


def test_shapes_of_both_architectures(models: Path) -> None:
    llama, qwen = LLMShape.from_directory(models / "llama3"), LLMShape.from_directory(models / "qwen2")
    assert (llama.architecture, llama.qkv_bias, llama.head_size, llama.tied_embeddings) == (
        "LlamaForCausalLM",
        False,
        16,
        False,
    )
    assert llama.rope_base == 1000.0
    assert llama.rope_scaling == RopeScaling(6.0, 1.5, 5.0, 40)
    assert (qwen.architecture, qwen.qkv_bias, qwen.head_size, qwen.tied_embeddings) == (
        "Qwen2ForCausalLM",
        True,
        4,
        True,
    )
    assert (qwen.rope_base, qwen.rope_scaling) == (5000.0, None)


def test_the_spelling_of_rotary_settings_does_not_matter(models: Path, tmp_path: Path) -> None:
    old = shutil.copytree(models / "llama3", tmp_path / "old")
    scaling = {key: value for key, value in ROPE.items() if key != "rope_theta"}
    tiny_llms.edit_config(old, ("rope_parameters",), rope_scaling=scaling, rope_theta=ROPE["rope_theta"])
    assert LLMShape.from_directory(old) == LLMShape.from_directory(models / "llama3")
    tiny_llms.edit_config(old, ("rope_scaling",), rope_theta=500000)
    assert LLMShape.from_directory(old).rope_base == 500000.0
    assert LLMShape.from_directory(old).rope_scaling is None


def _config(*remove: str, **values: Any) -> Damage:
    return lambda directory: tiny_llms.edit_config(directory, remove, **values)


def _rope(**values: Any) -> Damage:
    changed = {key: value for key, value in {**ROPE, **values}.items() if value is not None}
    return _config(rope_parameters=changed)


def _cut(size: int) -> Damage:
    """Keep the first ``size`` bytes of the weights, or all but the last ``-size``."""
    return lambda directory: (directory / SINGLE).write_bytes((directory / SINGLE).read_bytes()[:size])


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / SINGLE)
        change(tensors)
        save_file(tensors, directory / SINGLE)

    return apply


def _pickled(directory: Path) -> None:
    (directory / SINGLE).rename(directory / "pytorch_model.bin")


NORM, GATE = "model.layers.2.input_layernorm.weight", "model.layers.1.mlp.gate_proj.weight"
WRONG: list[tuple[str, Damage, str]] = [
    ("no config", lambda d: (d / "config.json").unlink(), r"llm.path='.*': .*config.json does not exist; give"),
    ("config no JSON", lambda d: (d / "config.json").write_text("{"), r"config.json cannot be read \(.*fetch it again"),
    ("config a list", lambda d: (d / "config.json").write_text("[]"), r"config.json holds no JSON object"),
    (
        "architecture",
        _config(architectures=["MistralForCausalLM"]),
        r"config.json names architectures=\['MistralForCausalLM'\]; supported: LlamaForCausalLM, Qwen2ForCausalLM",
    ),
    ("no architecture", _config("architectures"), r"config.json names architectures=None; supported"),
    ("model type", _config(model_type="phi3"), r"model_type='phi3'; it must be 'llama'"),
    ("key missing", _config("vocab_size"), r"config.json has no 'vocab_size'"),
    ("key wrong", _config(num_hidden_layers="four"), r"has num_hidden_layers='four'; it must be a number above 0"),
    ("key fractional", _config(num_hidden_layers=2.5), r"has num_hidden_layers=2.5; it must be a whole number"),
    ("groups", _config(num_key_value_heads=3), r"num_attention_heads=8, not a multiple of num_key_value_heads=3"),
    ("attention bias", _config(attention_bias=True), r"sets attention_bias=true, which is not supported"),
    ("activation", _config(hidden_act="gelu"), r"sets hidden_act='gelu'; supported: 'silu'"),
    ("quantised", _config(quantization_config={"quant_method": "gptq"}), r"sets quantization_config; give"),
    ("rope type", _rope(rope_type="yarn"), r"rope_type='yarn'; supported: 'default', 'llama3'"),
    ("rope factor", _rope(factor=None), r"config.json has no 'factor'"),
    ("rope factors", _rope(low_freq_factor=5.0), r"low_freq_factor=5.0, which is not below high_freq_factor=5.0"),
    ("partial rope", _rope(partial_rotary_factor=0.5), r"sets partial_rotary_factor=0.5; supported: 1.0"),
    ("no weights", lambda d: (d / SINGLE).unlink(), r"has neither model.safetensors nor .*index.json; fetch"),
    ("pickled weights", _pickled, r"has neither .*; save its pytorch_model.bin as safetensors"),
    ("tensor missing", _tensors(lambda t: t.pop(NORM)), rf"has no tensor '{NORM}'; it is incomplete"),
    ("output missing", _tensors(lambda t: t.pop("lm_head.weight")), r"has no tensor 'lm_head.weight'"),
    (
        "tensor shape",
        _tensors(lambda t: t.update({GATE: torch.zeros(32, 48)})),
        rf"'{GATE}' in .*{SINGLE} has shape \[32, 48\], but config.json asks \[48, 32\]",
    ),
    ("tensor type", _tensors(lambda t: t.update({GATE: t[GATE].to(torch.int8)})), rf"'{GATE}' in .* has type I8"),
    ("data cut off", _cut(-100), r"model.safetensors has \d+ bytes, its header asks \d+: .* cut off; fetch it again"),
    ("header cut off", _cut(200), r"model.safetensors is cut off in its header after 200 bytes; fetch it again"),
    ("empty file", _cut(0), r"model.safetensors is cut off in its header after 0 bytes"),
    ("no safetensors", lambda d: (d / SINGLE).write_bytes(b"PK\3\4" * 99), r"model.safetensors is no safetensors file"),
    (
        "LFS pointer",
        lambda d: (d / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        r"model.safetensors is a Git LFS pointer.*git lfs pull",
    ),
]


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_directories_are_named(models: Path, tmp_path: Path, damage: Damage, message: str) -> None:
    directory = shutil.copytree(models / "llama3", tmp_path / "llm")
    damage(directory)
    with pytest.raises(UserError, match=message) as error:
        check_directory(directory)
    assert str(directory) in str(error.value)
    assert "\n" not in str(error.value)


def _index(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = directory / f"{SINGLE}.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def _swap(files: dict[str, str]) -> None:
    files[NORM] = next(name for name in files.values() if name != files[NORM])


SHARDED: list[tuple[str, Damage, str]] = [
    (
        "shard missing",
        lambda d: (d / json.loads((d / f"{SINGLE}.index.json").read_text())["weight_map"][NORM]).unlink(),
        r"index.json names model-0000\d-of-\d+.safetensors, which does not exist \(1 of \d+ shards\); fetch it",
    ),
    ("index no JSON", lambda d: (d / f"{SINGLE}.index.json").write_text("{}"), r"index.json is no index of shards"),
    ("index leaves", lambda d: _index(d, lambda f: f.update(x="../x")), r"names '../x', which is no file name"),
    ("not indexed", lambda d: _index(d, lambda f: f.pop(NORM)), rf"has no tensor '{NORM}'; it is incomplete"),
    ("wrongly indexed", lambda d: _index(d, _swap), rf"safetensors has no tensor '{NORM}', which .* puts there"),
    ("shard cut off", lambda d: _cut_shard(d), r"model-00001-of-\d+.safetensors has \d+ bytes, its header asks \d+"),
    (
        "window",
        _config("layer_types", use_sliding_window=True, sliding_window=8, max_window_layers=2),
        r"sliding-window",
    ),
    ("window layers", _config(layer_types=["sliding_attention"] * 4), r"sliding-window attention.*not supported"),
]


def _cut_shard(directory: Path) -> None:
    shard = min(directory.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in SHARDED], ids=[case[0] for case in SHARDED])
def test_wrong_shards_are_named(models: Path, tmp_path: Path, damage: Damage, message: str) -> None:
    directory = shutil.copytree(models / "sharded", tmp_path / "llm")
    damage(directory)
    with pytest.raises(UserError, match=message) as error:
        check_directory(directory)
    assert str(directory) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_of_somebody_else_is_not_to_be_fetched_again() -> None:
    told = str(unreadable(Path("weights"), PermissionError(13, "Permission denied")))
    assert told == "llm.path: weights cannot be read (Permission denied); give this user the right to read it."


def test_windows_that_no_layer_has_are_accepted(models: Path) -> None:
    # As Qwen2.5's own config.json has it: a window is named and switched off.
    config = json.loads((models / "qwen2" / "config.json").read_text())
    assert config["use_sliding_window"] is False
    check_directory(models / "qwen2")


def test_launchers_find_damage_before_they_start_anything(models: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(models / "llama3", tmp_path / "llm")
    with pytest.raises(UserError, match=r"llm has no tokenizer.json; fetch it"):
        validate(load_config(["experiment=tiny", f"llm.path={directory}"]), world_size=2)
    _cut(-1)(directory)
    with pytest.raises(UserError, match=r"llm/model.safetensors has \d+ bytes"):
        validate(load_config(["experiment=tiny", f"llm.path={directory}"]), world_size=2)


def test_the_check_needs_no_torch(models: Path) -> None:
    code = (
        "import sys; from mome_dist.llm.directory import check_directory; check_directory(sys.argv[1]); "
        "assert not {'torch', 'safetensors', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(models / "sharded")], check=True, timeout=60)


def test_the_one_process_form_is_transformers_own_class(models: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(models / "qwen2", tmp_path / "llm")
    (directory / "generation_config.json").write_text('{"repetition_penalty": 5.0, "do_sample": true}')
    model = load_hugging_face(directory, torch.float32)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.generation_config.repetition_penalty is None
    assert type(load_hugging_face(models / "llama3", torch.float32)).__name__ == "LlamaForCausalLM"
    tiny_llms.edit_config(directory, architectures=["Custom"], auto_map={"AutoModelForCausalLM": "evil.Custom"})
    with pytest.raises(UserError, match="supported"):
        load_hugging_face(directory, torch.float32)
