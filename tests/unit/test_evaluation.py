"""The evaluation command on a small run: its files, against figures computed another way."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mome_dist import evaluate
from mome_dist.data.corpus import Corpus
from mome_dist.errors import UserError
from mome_dist.evaluation.activations import Activations
from mome_dist.evaluation.decoding import decode
from mome_dist.evaluation.run import derangement
from mome_dist.evaluation.tables import markdown_report, table_columns, tables_for_terminal
from mome_dist.inference.load import load_run
from mome_dist.speech.matryoshka import audio_frames, compressed_length
from mome_dist.speech.views import View
from tests.evaluation_run import STEP, make_run

VIEWS = "rates=[asr(4),avsr(4,5),asr(10)]"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_corpus_dir: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("evaluation"), tiny_corpus_dir)


@pytest.fixture(scope="module")
def results(run: Path) -> dict[str, Any]:
    assert evaluate.main([str(run), VIEWS, "untrained_rates=true", "baselines=[chance,untrained]", "seed=3"]) == 0
    found: dict[str, Any] = json.loads((run / "evaluation" / "results.json").read_text())
    return found


def lines_of(run: Path, view: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "evaluation" / "hypotheses.jsonl").read_text().splitlines())
    return [line for line in lines if line["view"] == view]


def distance(reference: list[str], hypothesis: list[str]) -> int:
    """Levenshtein's distance, the textbook way."""
    row = list(range(len(hypothesis) + 1))
    for i, word in enumerate(reference, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(hypothesis, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
    return row[-1]


def rate(references: list[str], hypotheses: list[str]) -> float:
    pairs = [(a.split(), b.split()) for a, b in zip(references, hypotheses, strict=True)]
    return 100 * sum(distance(a, b) for a, b in pairs) / sum(len(a) for a, _ in pairs)


def test_rates_are_those_of_the_hypotheses(run: Path, results: dict[str, Any], tiny_corpus: Corpus) -> None:
    assert [view["view"] for view in results["views"]] == ["asr(4)", "avsr(4,5)", "asr(10)"]
    assert [view["trained"] for view in results["views"]] == [True, True, False]
    assert (results["step"], results["utterances"]) == (STEP, 4)
    references = [utterance.text for utterance in tiny_corpus.split("test")]
    for view in results["views"]:
        lines = lines_of(run, view["view"])
        assert [line["reference"] for line in lines] == references
        hypotheses = [line["hypothesis"] for line in lines]
        assert view["wer"] == pytest.approx(rate(references, hypotheses))
        assert view["untrained_wer"] == pytest.approx(rate(references, [line["untrained"] for line in lines]))
        assert view["words"] == sum(len(text.split()) for text in references)
        assert view["substitutions"] + view["deletions"] + view["insertions"] == sum(line["errors"] for line in lines)
        assert view["real_time_factor"] > 0
        assert view["tokens_per_second"] > 0


def test_chance_is_decoding_the_speech_of_another_utterance(
    run: Path, results: dict[str, Any], tiny_corpus: Corpus
) -> None:
    loaded, utterances = load_run(run), tiny_corpus.split("test")
    others = [utterances[i] for i in derangement(len(utterances), 3)]
    raw = [torch.from_numpy(tiny_corpus.audio(other)) for other in others]
    texts = decode(
        loaded.model,
        loaded.sequences,
        View("asr", 4, None),
        loaded.encoders()["audio"](raw),
        [],
        loaded.config.decoding,
    )
    assert results["views"][0]["chance_wer"] == pytest.approx(rate([u.text for u in utterances], texts))


def test_untrained_is_the_model_before_training(run: Path, results: dict[str, Any], tiny_corpus: Corpus) -> None:
    before, utterances = load_run(run, weights=False), tiny_corpus.split("test")
    raw = [torch.from_numpy(tiny_corpus.audio(utterance)) for utterance in utterances]
    texts = decode(
        before.model,
        before.sequences,
        View("asr", 4, None),
        before.encoders()["audio"](raw),
        [],
        before.config.decoding,
    )
    assert [line["untrained"] for line in lines_of(run, "asr(4)")] == texts
    assert [line["hypothesis"] for line in lines_of(run, "asr(4)")] != texts


def test_activations_count_every_prefix_token_once(run: Path, results: dict[str, Any], tiny_corpus: Corpus) -> None:
    activations = Activations.load(run / "evaluation" / "activations.safetensors")
    assert activations.views == ("asr(4)", "avsr(4,5)", "asr(10)")
    utterances = tiny_corpus.split("test")
    prompt = load_run(run, weights=False).sequences
    tokens = activations.counts.sum(dim=-1) / activations.top_k
    for column, view in enumerate([View("asr", 4, None), View("avsr", 4, 5), View("asr", 10, None)]):
        audio = sum(compressed_length(audio_frames(u.samples), view.audio_rate or 1) for u in utterances)
        video = sum(compressed_length(u.frames, view.video_rate) for u in utterances if view.video_rate)
        text = prompt.overhead(view) * len(utterances)
        assert tokens[:, column].tolist() == [[audio, video, text]] * 2


def test_table(results: dict[str, Any], run: Path) -> None:
    columns = table_columns(results["views"])
    rows = list(zip(*columns.values(), strict=True))
    assert rows[1][:3] == ("AVSR", "(4,5)", f"{results['views'][1]['wer']:.1f}")
    assert rows[2][1] == "(10) *"
    markdown = (run / "evaluation" / "results.md").read_text()
    assert markdown.startswith(f"# small, step {STEP}: test split, 4 utterances")
    assert markdown_report(results) in markdown
    assert "| AVSR | (4,5) |" in markdown
    assert "not among the views of the training" in markdown
    page = io.StringIO()
    Console(width=80, file=page).print(*tables_for_terminal("title", results))
    printed = page.getvalue()
    assert "\u2026" not in printed, "the table does not fit 80 columns"
    columns.pop("words")  # not in the terminal
    assert all(cell in printed for column in columns.values() for cell in column)
    bare = [{**results["views"][0], "chance_wer": None, "untrained_wer": None}]
    assert {"chance %", "untrained %"} <= columns.keys() - table_columns(bare).keys()


def test_beams_limit_and_output(run: Path, results: dict[str, Any], tmp_path: Path) -> None:
    arguments = [f"checkpoint={run / 'checkpoints' / f'step-{STEP:06d}'}", f"output={tmp_path / 'out'}"]
    assert evaluate.main([*arguments, "rates=vsr(2)", "limit=2", "num_beams=2", "split=validation"]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (found["utterances"], found["split"], found["decoding"]["num_beams"]) == (2, "validation", 2)
    assert found["views"][0]["chance_wer"] is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".owner",  # who wrote them
        "activations.safetensors",
        "hypotheses.jsonl",
        "results.json",
        "results.md",
    ]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["limit=0"], "limit=0"),
        (["split=dev"], "dev"),
        (["num_beams=0"], "num_beams=0"),
        (["baselines=[luck]"], "luck"),
        (["baselines=[chance]", "limit=1"], "at least two"),
        (["rates=[asr(0)]"], "asr(0)"),
        (["beams=3"], "beams"),
    ],
)
def test_mistakes_end_in_one_line(
    run: Path, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([f"checkpoint={run}", *arguments]) == 2
    message = capsys.readouterr().err
    assert named in message
    assert "Traceback" not in message


@pytest.mark.parametrize("count", [2, 3, 10, 61])
def test_derangement_leaves_nothing_in_place(count: int) -> None:
    for seed in range(20):
        order = derangement(count, seed)
        assert sorted(order) == list(range(count))
        assert all(place != value for place, value in enumerate(order))
    assert derangement(count, 1) == derangement(count, 1)
    assert count < 10 or derangement(count, 1) != derangement(count, 2)


def test_derangement_needs_two() -> None:
    with pytest.raises(UserError, match="at least two"):
        derangement(1, 0)
