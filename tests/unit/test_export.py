"""Exports: complete without their run, the same bytes every time, and refused when anything in or under them is off."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file, save_file

from mome_dist import evaluate, transcribe
from mome_dist.checkpoint.adapter import CARD, CONFIG, SUMS, WEIGHTS
from mome_dist.checkpoint.format import CheckpointReader, find_checkpoint, fingerprint
from mome_dist.commands import export as command
from mome_dist.data.corpus import Corpus
from mome_dist.data.media import write_media_file
from mome_dist.errors import UserError
from mome_dist.export.adapter import export_adapter
from mome_dist.export.card_metadata import card_data
from mome_dist.export.model_card import model_card
from mome_dist.hub import HubModel
from mome_dist.inference.load import load_run
from mome_dist.transcription.results import Transcription
from tests.evaluation_run import STEP, make_run

FILES = {WEIGHTS, CONFIG, CARD, SUMS}
HUB = HubModel("owner/lips", None)
FROZEN = {"llm": "llm", "audio_encoder": "whisper", "video_encoder": "lips"}  # where `make_run` puts them


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Corpus) -> Path:
    utterance = tiny_corpus.split("test")[0]
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_media_file(path, tiny_corpus.audio(utterance), tiny_corpus.video(utterance))
    return path


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copied"))


def test_weights_are_those_of_the_checkpoint_and_nothing_else(run: Path, exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == FILES
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1, "who may read one may read all"
    tensors = load_file(exported / WEIGHTS)
    with CheckpointReader(find_checkpoint(run)) as reader:
        assert {f"model/{name}" for name in tensors} == set(reader.names("model/"))
        for name, tensor in tensors.items():
            assert tensor.dtype is torch.float32
            assert torch.equal(tensor, reader.read(f"model/{name}"))
    assert not any("llm" in name for name in tensors), "the frozen LLM is named, never stored"


def test_config_names_what_it_takes(run: Path, exported: Path) -> None:
    document = json.loads((exported / CONFIG).read_text())
    root = run.parent.parent
    assert (document["name"], document["step"]) == ("small", STEP)
    assert document["frozen"] == {
        section: {"name": folder, "fingerprint": fingerprint(root / folder)} for section, folder in FROZEN.items()
    }
    assert document["views"] == ["asr(4)", "asr(16)", "vsr(2)", "vsr(5)", "avsr(4,5)"]
    trained = sum(tensor.numel() for tensor in load_file(exported / WEIGHTS).values())
    assert document["parameters"]["trained"] == trained
    assert document["parameters"]["mome_active_per_token"] < document["parameters"]["mome"]
    assert not {"parallel", "optimizer", "training", "deepspeed", "output_dir"} & document["config"].keys()


def test_the_same_checkpoint_gives_the_same_bytes(run: Path, exported: Path, tmp_path: Path) -> None:
    export_adapter(find_checkpoint(run), tmp_path / "deep" / "again")
    for name in FILES:
        assert (tmp_path / "deep" / "again" / name).read_bytes() == (exported / name).read_bytes(), name
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["again"]


def test_hashes_are_those_of_coreutils(exported: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=exported, check=True, capture_output=True)


def test_a_copy_transcribes_without_the_run(
    tmp_path: Path, tiny_corpus_dir: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "here", tiny_corpus_dir)
    rates = ["--audio-rate", "4", "--video-rate", "5"]
    assert command.main([str(run), str(tmp_path / "exported")]) == 0
    assert "step 7" in capsys.readouterr().out
    assert transcribe.main([str(run), str(clip), *rates]) == 0
    text = capsys.readouterr().out
    assert text.strip(), "a text to compare"
    away = tmp_path / "elsewhere" / "adapter"
    shutil.copytree(tmp_path / "exported", away)
    shutil.rmtree(run)
    shutil.rmtree(tmp_path / "exported")
    assert transcribe.main([str(away), str(clip), *rates]) == 0
    assert capsys.readouterr().out == text
    # The frozen models move too.
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert transcribe.main([str(away), str(clip), *rates]) == 2
    assert re.search(
        r"error: llm: .*/here/llm does not exist; name its directory with --llm DIR", capsys.readouterr().err
    )
    moved = [
        word
        for section, folder in FROZEN.items()
        for word in (f"--{section.replace('_', '-')}", str(tmp_path / "there" / folder))
    ]
    assert transcribe.main([str(away), str(clip), *rates, *moved]) == 0
    assert capsys.readouterr().out == text
    assert evaluate.main([f"checkpoint={away}", "limit=1", "rates=asr(4)", "baselines=[untrained]"]) == 2
    where = [f"{section}={tmp_path / 'there' / folder}" for section, folder in FROZEN.items()]
    assert evaluate.main([f"checkpoint={away}", "limit=1", "rates=asr(4)", f"output={tmp_path / 'out'}", *where]) == 0
    assert json.loads((tmp_path / "out/results.json").read_text())["step"] == STEP


def test_packaged_models_are_found_in_the_cache_of_another_machine(
    tmp_path: Path, tiny_corpus_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOME_DIST_CACHE", str(tmp_path / "mine"))
    run = make_run(tmp_path / "mine", tiny_corpus_dir)
    export_adapter(run, tmp_path / "exported")
    config = json.loads((tmp_path / "exported" / CONFIG).read_text())["config"]
    assert config["llm"]["path"] == "${cache:llm}"
    shutil.move(tmp_path / "mine", tmp_path / "theirs")
    monkeypatch.setenv("MOME_DIST_CACHE", str(tmp_path / "theirs"))
    assert load_run(tmp_path / "exported").config.llm.path == str(tmp_path / "theirs/llm")


def test_the_card_says_what_it_is_and_its_python_runs(
    exported: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (exported / CARD).read_text()
    for said in ("6 routed, 2 a token", "ASR (speech to text), trained at rates (4), (16)", "AVSR", "2510.04136"):
        assert said in card
    assert "not evaluated" in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    directory = shutil.copytree(exported, tmp_path / "adapter")
    shutil.copy(clip, directory / "clip.flac")
    monkeypatch.chdir(directory)
    names: dict[str, object] = {}
    exec(snippet, names)
    assert isinstance(spoken := names["said"], Transcription) and spoken.text


def test_the_card_does_not_call_kept_projectors_trained(exported: Path) -> None:
    run, document = load_run(exported), json.loads((exported / CONFIG).read_text())
    assert model_card(run, document, None) == (exported / CARD).read_text()
    run.config.projector.trainable = False
    assert "projectors were taken from another run" in model_card(run, document, None)


def test_results_are_in_the_card_when_they_are_of_that_step(tmp_path: Path, tiny_corpus_dir: Path) -> None:
    run = make_run(tmp_path, tiny_corpus_dir)
    assert evaluate.main([f"checkpoint={run}", "limit=1", "rates=asr(4)"]) == 0
    export_adapter(run, tmp_path / "with", licence="cc-by-4.0")
    table = (run / "evaluation/results.md").read_text().split("\n\n", 1)[1].rstrip("\n")
    assert table in (tmp_path / "with" / CARD).read_text()
    _check_metadata(tmp_path / "with" / CARD, "cc-by-4.0", json.loads((run / "evaluation/results.json").read_text()))
    results = run / "evaluation/results.json"
    results.write_text(results.read_text().replace(f'"step": {STEP}', f'"step": {STEP + 1}'))
    export_adapter(run, tmp_path / "without")
    assert "not evaluated" in (tmp_path / "without" / CARD).read_text()


def _check_metadata(card: Path, licence: str, results: dict[str, Any] | None) -> None:
    """What the hub reads of a card is what the library for it writes, and says what was measured."""
    parsed = ModelCard.load(card)
    data = parsed.data
    assert isinstance(data, ModelCardData) and ModelCardData(**data.to_dict()).to_dict() == data.to_dict()
    assert (data.library_name, data.pipeline_tag) == ("mome_dist", "automatic-speech-recognition")
    assert data.license == licence and isinstance(data.license, str)
    assert data.base_model is None and data.datasets is None, "nothing of the hub is in this run"
    if results is None:
        assert data.eval_results is None and data.metrics is None
        return
    assert data.eval_results is not None and data.model_name == "small" and data.metrics == ["wer"]
    assert [(each.metric_type, each.metric_value) for each in data.eval_results] == [
        ("wer", round(view["wer"], 2)) for view in results["views"]
    ]
    (found,) = data.eval_results
    assert (found.dataset_name, found.dataset_split) == (results["corpus"], "test")
    assert found.task_name == "speech to text, asr(4)"
    _, again = model_index_to_eval_results(eval_results_to_model_index("small", data.eval_results))
    assert again == data.eval_results


def test_the_hub_is_told_what_an_export_is_made_of(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _check_metadata(exported / CARD, "unknown", None)
    run, document = load_run(exported), json.loads((exported / CONFIG).read_text())
    run.config.llm.path, run.config.data.corpus = "assets/smollm2-135m", "corpora/LRS3"
    monkeypatch.setattr("mome_dist.export.card_metadata.model_at", lambda path: HUB if path.name == "lips" else None)
    data = card_data(run, document, None)
    assert (data.base_model, data["base_model_relation"]) == (
        ["HuggingFaceTB/SmolLM2-135M-Instruct", "owner/lips"],
        "adapter",
    )
    assert data.datasets == ["lrs3"]
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "openai/whisper-tiny.en"):
        validate_repo_id(name)
    with pytest.raises(UserError, match="licence 'My own' is no identifier"):
        export_adapter(exported, exported.with_name("none"), licence="My own")


@pytest.mark.parametrize("name", sorted(FILES))
def test_one_changed_byte_is_found(copied: Path, name: str) -> None:
    content = (copied / name).read_bytes()
    for place in (0, len(content) // 2, len(content) - 1):
        (copied / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match=re.escape(name)):
            load_run(copied)
    (copied / name).unlink()
    with pytest.raises(UserError, match=re.escape(name)):
        load_run(copied)


def test_a_file_of_another_export_is_found(copied: Path) -> None:
    """Even if somebody writes the hashes anew."""
    tensors = load_file(copied / WEIGHTS)
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] + 1}, copied / WEIGHTS)
    sums = subprocess.run(["sha256sum", WEIGHTS, CONFIG], cwd=copied, check=True, capture_output=True).stdout
    (copied / SUMS).write_bytes(sums)
    with pytest.raises(UserError, match=r"config\.json belongs to another model\.safetensors"):
        load_run(copied)


def _edit_llm(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 10000', '"rope_theta": 20000'))


def _edit_tokenizer(folder: Path) -> None:
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_edit_llm, r"llm: .*other is not the model that .*copied was trained with; name its directory with --llm DIR"),
        (_edit_tokenizer, r"llm: the tokenizer in .*other is not the one .*\(tokenizer_sha256 differs\); .* --llm DIR"),
        (shutil.rmtree, r"llm: .*other does not exist; name its directory with --llm DIR"),
    ],
)
def test_another_llm_is_refused(
    copied: Path, run: Path, tmp_path: Path, change: Callable[[Path], None], named: str
) -> None:
    other = Path(shutil.copytree(run.parent.parent / "llm", tmp_path / "other"))
    load_run(copied, frozen={"llm": other})
    change(other)
    with pytest.raises(UserError, match=named):
        load_run(copied, frozen={"llm": other})


def test_mistakes(run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis").mkdir()
    for arguments, named in (
        ([run, tmp_path / "thesis"], "thesis exists, and an export replaces nothing"),
        ([exported, tmp_path / "new"], "is an export already"),
        ([tmp_path / "nothing", tmp_path / "new"], "nothing: there is no such folder; name a run"),
        ([run, tmp_path / "new", "--audio-encoder", run.parent.parent / "lips"], "audio_encoder: "),
    ):
        assert command.main(list(map(str, arguments))) == 2
        assert named in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"], "a refused export leaves nothing behind"
