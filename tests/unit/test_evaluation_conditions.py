"""Evaluation in noise and with broken video: mixtures are what they say, and what no view notices is not decoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mome_dist import evaluate, report
from mome_dist.data.corpus import Corpus
from mome_dist.data.noise import Babble, mix_at_snr
from mome_dist.data.transforms import corrupt
from mome_dist.errors import UserError
from mome_dist.evaluation.comparison import compare, read_texts
from mome_dist.evaluation.conditions import Case, Condition, cases_of, conditions_of
from mome_dist.evaluation.decoding import decode
from mome_dist.evaluation.published import PUBLISHED
from mome_dist.evaluation.request import EvaluationRequest, names_of, parse_request, ratios_of
from mome_dist.evaluation.tables import clean_views, grid_columns, published_section
from mome_dist.inference.load import load_run
from mome_dist.speech.video_encoder import VideoEncoder
from mome_dist.speech.views import View
from tests.evaluation_run import make_run

ASR, VSR, AVSR = View("asr", 4, None), View("vsr", None, 5), View("avsr", 4, 5)
ARGUMENTS = [
    "rates=[asr(4),vsr(5),avsr(4,5)]",
    "noise=[clean,babble]",
    "snr=[0,10]",
    "video_corruption=[none,occlusion:0.75]",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_corpus_dir: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("conditions"), tiny_corpus_dir)


@pytest.fixture(scope="module")
def results(run: Path) -> dict[str, Any]:
    assert evaluate.main([f"checkpoint={run}", *ARGUMENTS]) == 0
    found: dict[str, Any] = json.loads((run / "evaluation/results.json").read_text())
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_view_is_decoded_once_for_what_it_cannot_notice() -> None:
    conditions = conditions_of(["clean", "babble"], [0.0, 10.0], ["none", "blur"])
    assert len(conditions) == 6
    cases = cases_of([ASR, VSR, AVSR], conditions)
    assert [case.condition.snr for case in cases if case.view == ASR] == [None, 0.0, 10.0]
    assert [case.condition.corruption for case in cases if case.view == VSR] == [None, "blur:0.5"]
    assert len([case for case in cases if case.view == AVSR]) == 6
    assert len(set(cases)) == len(cases)
    assert cases_of([VSR], conditions_of(["babble"], [5.0], ["none"])) == [Case(VSR, Condition())]


def test_every_mixture_is_written_with_its_ratio(run: Path, results: dict[str, Any], tiny_corpus: Corpus) -> None:
    mixtures = lines(run / "evaluation/noise.jsonl")
    utterances = tiny_corpus.split("test")
    assert [(line["snr"], line["id"]) for line in mixtures] == [(snr, u.id) for snr in (0, 10) for u in utterances]
    for line in mixtures:
        assert line["measured"] == pytest.approx(line["snr"], abs=0.01)
        assert line["noise"] == "babble" and len(line["origins"]) == 8
    by_ratio = [[line["origins"] for line in mixtures if line["snr"] == snr] for snr in (0, 10)]
    assert by_ratio[0] == by_ratio[1], "the same noise at every ratio"


def test_texts_are_those_of_clips_that_were_mixed_and_broken_by_hand(
    run: Path, results: dict[str, Any], tiny_corpus: Corpus
) -> None:
    loaded, babble = load_run(run), Babble(tiny_corpus, seed=0)
    utterances = tiny_corpus.split("test")
    encoders = loaded.encoders()
    sounds = [mix_at_snr(tiny_corpus.audio(u), babble.noise(u), 0.0) for u in utterances]
    lips = [corrupt(tiny_corpus.video(u), "occlusion", 0.75, u.id, 0) for u in utterances]
    with torch.no_grad():
        audio = encoders["audio"]([torch.from_numpy(sound) for sound in sounds])
        video = encoders["video"]([torch.from_numpy(clip) for clip in lips])
    texts = {
        (line["view"], line["condition"], line["id"]): line["hypothesis"]
        for line in lines(run / "evaluation/hypotheses.jsonl")
    }
    for view, condition in (
        (ASR, "babble 0 dB"),
        (VSR, "occlusion:0.75"),
        (AVSR, "babble 0 dB, occlusion:0.75"),
    ):
        by_hand = decode(loaded.model, loaded.sequences, view, audio, video, loaded.config.decoding)
        found = [texts[str(view), condition, utterance.id] for utterance in utterances]
        assert found == by_hand
        # A random video encoder tells clips apart too little for all of these texts to differ from those of clean ones.
        clean = [texts[str(view), "clean", utterance.id] for utterance in utterances]
        assert found != clean or view != ASR


def test_video_is_encoded_once_for_all_ratios_as_it_is_and_broken(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_corpus: Corpus
) -> None:
    seen: list[torch.Tensor] = []
    forward = VideoEncoder.forward

    def recording(self: VideoEncoder, clips: Any) -> Any:
        seen.extend(clips)
        return forward(self, clips)

    monkeypatch.setattr(VideoEncoder, "forward", recording)
    arguments = [f"checkpoint={run}", f"output={tmp_path}", "rates=[vsr(5),avsr(4,5)]", "noise=[clean,babble]"]
    assert evaluate.main([*arguments, "snr=[0,10]", "video_corruption=[none,occlusion:0.75]", "limit=3"]) == 0
    utterances = tiny_corpus.split("test")[:3]
    clips = [tiny_corpus.video(utterance) for utterance in utterances]
    clips += [corrupt(clip, "occlusion", 0.75, u.id, 0) for u, clip in zip(utterances, clips, strict=True)]
    assert sorted(clip.numpy().tobytes() for clip in seen) == sorted(clip.tobytes() for clip in clips)


def test_costs_and_intervals_are_there(results: dict[str, Any]) -> None:
    assert len(results["views"]) == 3 + 2 + 6
    for view in results["views"]:
        assert 0 <= view["wer_low"] <= view["wer"] <= view["wer_high"]
        assert view["peak_memory_bytes"] > 1e6
        assert view["llm_tokens"] > 0
    tokens = {view["view"]: view["llm_tokens"] for view in results["views"]}
    assert tokens["avsr(4,5)"] > tokens["asr(4)"]


def test_the_grid_has_a_number_for_every_condition(results: dict[str, Any]) -> None:
    columns = grid_columns(results["views"], intervals=False)
    assert len(columns["condition"]) == 6
    by_condition = dict(zip(columns["condition"], columns["ASR (4)"], strict=True))
    assert by_condition["babble 0 dB, occlusion:0.75"] == f"[{by_condition['babble 0 dB']}]"
    assert by_condition["occlusion:0.75"] == f"[{by_condition['clean']}]"
    assert "-" not in {cell for cells in columns.values() for cell in cells}
    assert {view["condition"] for view in clean_views(results["views"])} == {"clean"}


def test_the_report_shows_noise_video_and_cost(run: Path, results: dict[str, Any]) -> None:
    assert report.main([f"run={run}"]) == 0
    page = (run / "report/report.md").read_text()
    for name in ("wer", "wer_noise", "wer_video", "wer_cost"):
        assert f"({name}.png)" in page
        assert (run / f"report/{name}.png").stat().st_size > 10_000
    assert "| babble 0 dB |" in page and "95 % CI" in page


def test_two_evaluations_are_compared_on_the_same_utterances(
    run: Path, results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"checkpoint={run}", f"output={tmp_path / 'other'}", *ARGUMENTS, f"compare={run}"]
    assert evaluate.main([*arguments, "num_beams=3", "precision=bf16"]) == 0
    other = json.loads((tmp_path / "other/results.json").read_text())
    assert (other["precision"], results["precision"]) == ("bf16", "fp32")
    rows = other["comparison"]["views"]
    assert len(rows) == len(other["views"])
    for row, mine, theirs in zip(rows, other["views"], results["views"], strict=True):
        assert row["wer"] == pytest.approx(mine["wer"]) and row["other_wer"] == pytest.approx(theirs["wer"])
        assert row["low"] <= row["difference"] <= row["high"]
    assert f"Against {run}" in (tmp_path / "other/results.md").read_text()
    texts = read_texts(run)
    shortened = {key: dict(list(found.items())[1:]) for key, found in texts.items()}
    with pytest.raises(UserError, match="other utterances"):
        compare(texts, shortened)
    with pytest.raises(UserError, match="in common"):
        compare({}, texts)
    assert evaluate.main([f"checkpoint={run}", f"compare={tmp_path}"]) == 2
    assert "evaluate that run first" in capsys.readouterr().err


def test_published_figures_stand_apart_from_another_corpus(results: dict[str, Any]) -> None:
    pairs = ["avsr(4,2)", "avsr(4,5)", "avsr(16,2)", "avsr(16,5)"]
    entry = results["views"][0]
    views = [{**entry, "view": name, "wer": 1.25} for name in pairs]
    here = published_section({**results, "corpus": "LRS3", "views": views})
    assert "another corpus" not in here
    assert "| MoME-23/4-LAYER | LRS3; MoME, arXiv 2510.04136 | 1.5 | 1.8 | 3.1 | 3.2 |" in here
    assert "LRS2" not in here and "**small, measured here**" in here
    apart = published_section({**results, "corpus": "commands", "views": views})
    measured, published = apart.split("another corpus")
    assert "measured here" in measured and "MoME-23/4" not in measured
    assert "| MoME-23/4-LAYER | LRS2; MoME, arXiv 2510.04136 | 2.7 | 2.7 | 4.2 | 4.2 |" in published
    assert published_section({**results, "views": [{**entry, "view": "asr(7)"}]}) == ""
    assert {line.corpus for line in PUBLISHED} == {"LRS2", "LRS3"}


def test_arguments_of_conditions() -> None:
    request = parse_request(EvaluationRequest, ["noise=babble", "snr=0", "video_corruption=[none,blur]"])
    assert names_of("noise", request.noise) == ["babble"]
    assert ratios_of(request.snr) == [0.0], "0 dB is a ratio, not nothing"
    assert ratios_of([-5, 0, 5.5, 0]) == [-5.0, 0.0, 5.5]
    assert ratios_of(parse_request(EvaluationRequest, []).snr) == [-5.0, 0.0, 5.0, 10.0]


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("snr=[loud]", "snr="),
        ("snr=null", "snr="),
        ("snr=.nan", "snr="),
        ("noise=[3]", "noise="),
        ("noise=/no/such/place", "does not exist"),
        ("video_corruption=rain", "occlusion, blur"),
        ("video_corruption=blur:2", "severity"),
        ("video_corruption=blur:0", "severity"),
        ("max_new_tokens=0", "max_new_tokens=0"),
        ("tokens_per_second=-1", "tokens_per_second=-1"),
        ("select=worst", "latest, best"),
        ("device_map=3", "device_map=3"),
        ("precision=fp8", "bf16, fp32"),
    ],
)
def test_wrong_arguments_end_in_one_line(
    run: Path, argument: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([f"checkpoint={run}", "noise=babble", argument]) == 2
    message = capsys.readouterr().err
    assert named in message and "Traceback" not in message
