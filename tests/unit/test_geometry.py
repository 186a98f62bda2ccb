"""An encoder meets only crops of the geometry that it was trained on; what older versions wrote is known or refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mome_dist.assets import asset_dir
from mome_dist.config import load_config
from mome_dist.data.corpus import Corpus
from mome_dist.data.preparation.settings import PreparationSettings
from mome_dist.errors import UserError
from mome_dist.evaluation.command import evaluate
from mome_dist.evaluation.request import EvaluationRequest
from mome_dist.parallel import plain_world
from mome_dist.parallel.plain_world import World
from mome_dist.preflight import validate
from mome_dist.speech.avhubert import AVHubertConfig, AVHubertEncoder
from mome_dist.speech.clip_encoder import ClipEncoder
from mome_dist.speech.geometry import AVHUBERT, RENDERED, geometry_of
from mome_dist.speech.video_encoder import VideoEncoder
from mome_dist.training.caching import cache_features
from tests.evaluation_run import WIDTHS, make_run

SHAPE = AVHubertConfig(trunk_widths=(4, 8), width=WIDTHS["video"], layers=1, heads=2, ffn_width=32)


def older(corpus: Path, copy: Path, settings: Mapping[str, Any]) -> Path:
    """A copy of a corpus, as a version that did not name geometries wrote it."""
    shutil.copytree(corpus, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["geometry"]
    (copy / "manifest.json").write_text(json.dumps(manifest | {"settings": settings}))
    return copy


def test_corpora_name_their_geometry(tiny_corpus: Corpus, tiny_corpus_dir: Path, tmp_path: Path) -> None:
    assert tiny_corpus.manifest["geometry"] == tiny_corpus.geometry == RENDERED
    settings = tiny_corpus.manifest["settings"]
    assert Corpus.open(older(tiny_corpus_dir, tmp_path / "drawn", settings)).geometry == RENDERED
    assert Corpus.open(older(tiny_corpus_dir, tmp_path / "filmed", {"source": "lrs3"})).geometry is None


@pytest.mark.parametrize(
    ("encoder", "expected"),
    [(VideoEncoder(), RENDERED), (AVHubertEncoder(SHAPE), AVHUBERT)],
    ids=["visemes", "avhubert"],
)
def test_encoders_of_older_versions_have_a_known_geometry(encoder: ClipEncoder, expected: str, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    assert "geometry" not in document and geometry_of(document) == expected
    assert geometry_of(document | {"geometry": "mine"}) == "mine"
    assert geometry_of({"format": "other/1"}) is None


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    """A run with the lips of an AV-HuBERT, but for its corpus."""
    AVHubertEncoder(SHAPE).save_pretrained(tmp_path / "lips")
    llm = asset_dir("smollm2-135m")
    return ["experiment=quickstart", "task.tasks=[vsr]", f"llm.path={llm}", f"video_encoder.path={tmp_path / 'lips'}"]


def test_a_run_refuses_crops_of_another_geometry(overrides: list[str], tiny_corpus_dir: Path, tmp_path: Path) -> None:
    message = (
        f"{tiny_corpus_dir}: the geometry of its crops is 'rendered', but video_encoder.path='{tmp_path / 'lips'}' "
        "expects 'avhubert': prepare it again with --geometry avhubert (mome-dist prepare), or choose another encoder."
    )
    config = load_config([*overrides, f"data.corpus={tiny_corpus_dir}"])
    (tmp_path / "lips/model.safetensors").unlink()  # no model is loaded before it is refused
    with pytest.raises(UserError, match=re.escape(message)):
        validate(config, 2)
    with pytest.raises(UserError, match=re.escape(message)):
        cache_features(config, None, plain_world.World(), Console(quiet=True))
    config.data.corpus = str(older(tiny_corpus_dir, tmp_path / "filmed", {"source": "lrs3"}))
    with pytest.raises(UserError, match="filmed: the geometry of its crops is an unknown one, as older versions"):
        validate(config, 2)
    (tmp_path / "lips/config.json").write_text("[]")
    with pytest.raises(UserError, match=r"lips/config\.json holds no JSON object"):
        validate(config, 2)


def test_an_evaluation_refuses_them_before_a_model_is_loaded(
    tiny_corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, tiny_corpus_dir, AVHubertEncoder(SHAPE))
    world, console = World(), Console(quiet=True)
    request = EvaluationRequest(checkpoint=str(run), limit=2)
    for baselines in ([], ["untrained"]):
        request.baselines = baselines
        with monkeypatch.context() as patch:
            patch.setattr("mome_dist.inference.load.build_reference", lambda *_: pytest.fail("a model was loaded"))
            with pytest.raises(UserError, match="is 'rendered', but video_encoder"):
                evaluate(request, world, console)
    request.baselines, request.rates = [], "asr(4)"  # nobody looks at the crops
    assert evaluate(request, world, console) is not None


@pytest.mark.parametrize(("key", "value"), [("least_faces", 1.5), ("geometry", "mine")])
def test_wrong_settings_of_a_preparation_are_named(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"--{key.replace('_', '-')} {value} "):
        PreparationSettings("lrs3", **{key: value})  # type: ignore[arg-type]  # the value is wrong on purpose
