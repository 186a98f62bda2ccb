"""Several runs on one page, HTML pages, and labels that cover nothing."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from mome_dist import report
from mome_dist.config.load import load_saved_config, save_config
from mome_dist.config.schema import RunConfig
from mome_dist.evaluation.comparison import compare, read_texts
from mome_dist.evaluation.condition_plots import corruption_figure, cost_figure, differences_figure, noise_figure
from mome_dist.evaluation.page import as_html
from mome_dist.evaluation.plots import losses_figure, wer_figure
from mome_dist.evaluation.run_comparison import flattened
from mome_dist.evaluation.style import DPI
from mome_dist.evaluation.tables import clean_views, markdown, plain
from mome_dist.training_log import Ends, TrainingLog

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def write_run(folder: Path, seed: int, wrong: float, **changes: Any) -> Path:
    """A run of 60 steps that was evaluated on 30 utterances in two views, without any model."""
    rng = np.random.default_rng(seed)
    (folder / "evaluation").mkdir(parents=True)
    config = RunConfig(name=folder.name, seed=seed, output_dir=str(folder))
    config.optimizer = dataclasses.replace(config.optimizer, **changes)
    save_config(config, folder / "config.yaml")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 61):
            loss = float(3 * np.exp(-step / 30) + wrong)
            file.write(json.dumps({"step": step, "loss": loss, "views": {"asr(4)": loss}}) + "\n")
        file.write(json.dumps({"step": 60, "validation": {"asr(4)": wrong, "vsr(2)": 3 * wrong}}) + "\n")
    with (folder / "evaluation" / "hypotheses.jsonl").open("w") as file:
        for view in ("asr(4)", "vsr(2)"):
            for number in range(30):
                words = [WORDS[(number + place) % 8] for place in range(6)]
                heard = ["no" if rng.random() < wrong else word for word in words]
                texts = {"reference": " ".join(words), "hypothesis": " ".join(heard)}
                file.write(json.dumps({"view": view, "condition": "clean", "id": f"u{number}", **texts}) + "\n")
    return folder


class Loads(HTMLParser):
    """What a page would load, and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_two_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_run(tmp_path / "base", 1, 0.5)
    second = write_run(tmp_path / "other", 2, 0.1, learning_rate=5e-4)
    assert report.main(["compare", str(first), f"run={second}"]) == 0
    folder = first / "report" / "against-other"
    assert capsys.readouterr().out.split() == [str(folder / "report.md"), str(folder / "report.html")]
    page = (folder / "report.md").read_text()
    section = page[page.index("## What differs") : page.index("## Training")]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")]
    assert rows[2:] == [["| seed", "1", "2 |"], ["| optimizer.learning_rate", "0.001", "0.0005 |"]]
    losses = [3 * np.exp(-step / 30) + 0.5 for step in range(1, 61)]
    told = f"{np.mean(losses[:20]):.3f} (mean of the first 20 steps) to {np.mean(losses[-20:]):.3f} (mean of the last"
    assert told in page and "1.000 at step 60 (the last)" in page and "mean of 2 views" in page
    for row in compare(read_texts(first), read_texts(second)):
        assert f"| {row['difference']:+.1f} | {row['low']:+.1f} to {row['high']:+.1f} |" in page
        assert row["high"] < 0, "a run with a fifth of the errors"
    loads = Loads((folder / "report.html").read_text())
    assert loads.tags.count("img") == 2 and loads.tags.count("table") == 3
    assert all(place.startswith("data:image/png;base64,") for place in loads.loaded)


def test_three_runs_of_which_one_is_not_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / folder / "run", seed, 0.2) for seed, folder in enumerate(("a", "b", "c"))]
    (runs[1] / "evaluation" / "hypotheses.jsonl").unlink()
    assert report.main(["compare", *map(str, runs), f"output={tmp_path / 'page'}"]) == 0
    page = (tmp_path / "page/report.md").read_text()
    assert f"{runs[1]} is not evaluated yet: run `mome-dist evaluate {runs[1]}`" in page
    assert f"### {runs[2]}" in page and f"| key | {runs[0]} | {runs[1]} | {runs[2]} |" in page, "folders of one name"
    lines = (runs[2] / "evaluation" / "hypotheses.jsonl").read_text().splitlines()
    (runs[2] / "evaluation" / "hypotheses.jsonl").write_text("\n".join(lines[1:]))
    assert report.main(["compare", *map(str, runs), f"output={tmp_path / 'page'}"]) == 0
    assert "does not compare with" in (tmp_path / "page/report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{a}"], "two runs or more"),
        (["{a}", "{a}"], "names a run twice"),
        (["{a}", "{a}x"], "there is no such folder"),
        (["{a}", "{b}", "--out"], "unknown --out; did you mean output?"),
        (["{a}", "{b}", "outpt=x"], "did you mean output?"),
    ],
)
def test_mistakes_of_a_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places = {name: write_run(tmp_path / name, 0, 0.2) for name in ("a", "b")}
    assert report.main(["compare", *(word.format(**places) for word in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_keys_are_named_as_on_a_command_line(tmp_path: Path) -> None:
    config = load_saved_config(write_run(tmp_path / "a", 0, 0.2) / "config.yaml")
    found = dict(flattened(dataclasses.asdict(config)))
    assert found["optimizer.betas"] == "[0.9, 0.98]" and found["training.resume"] == "true"
    assert found["llm.lora"] == "null" and found["name"] == "a"


def test_html_shows_what_markdown_says_and_loads_nothing(tmp_path: Path) -> None:
    (tmp_path / "real.png").write_bytes(b"\x89PNG")
    nasty = "<script>alert(1)</script> | ![x](http://example.com/x.png) [y](javascript:z) *b* `c` \\n# d"
    table = markdown({"name": [nasty], "n|": ["1"]})
    page = as_html(
        f"<t>{nasty}", f"# {plain(nasty)}\n\n{table}\n\n![R](real.png) ![N](../x.png) <b>raw</b>\n", tmp_path
    )
    loads = Loads(page)
    assert loads.loaded == ["data:image/png;base64,iVBORw=="]
    assert not {"script", "a", "em", "code", "b", "t"} & set(loads.tags) and loads.tags.count("td") == 2
    assert loads.tags.count("h1") == 1 and "default-src 'none'" in page
    shown = re.sub(r"<[^>]*>", "", page.replace("&lt;", "«").replace("&gt;", "»"))
    assert "«script»alert(1)«/script» | ![x](http://example.com/x.png) [y](javascript:z) *b* `c`" in shown


def evaluations() -> dict[str, Sequence[Mapping[str, Any]]]:
    """Views of all evaluations that the benchmarks have results of."""
    found: dict[str, Sequence[Mapping[str, Any]]] = {}
    for name in ("learning", "methods"):
        figures = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["figures"]
        found |= {f"{name} {method}": results["views"] for method, results in figures["evaluations"].items()}
    return found


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts of a figure that cover each other, as it is saved; none is cut off."""
    figure.set_dpi(DPI)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    unseen = set()  # matplotlib keeps labels of ticks beyond the limits, and does not draw them
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        unseen |= {tick.label1 for tick in ticks if not low <= tick.get_loc() <= high}
    boxes = []
    for text in figure.findobj(Text):
        if text in unseen or not text.get_text().strip() or not text.get_visible():
            continue
        box = Text.get_window_extent(text, renderer)  # of annotations, without their lines
        whole = figure.bbox.padded(1)
        assert whole.contains(*box.min) and whole.contains(*box.max), f"{text.get_text()!r} is cut off"
        boxes.append((text.get_text(), box))
    return [(one, other) for (one, a), (other, b) in combinations(boxes, 2) if a.padded(-1).overlaps(b.padded(-1))]


def test_no_text_covers_another_in_figures_of_real_evaluations() -> None:
    looked = 0
    for name, views in evaluations().items():
        for figure in (cost_figure(clean_views(views)), wer_figure(clean_views(views))):
            assert not overlaps(figure), name
            looked += 1
    assert looked > 10


def crowded(count: int = 24) -> list[dict[str, Any]]:
    """Views in a heap: all tasks and many rates, nearly alike in cost and accuracy."""
    rng, views = np.random.default_rng(3), []
    for number in range(count):
        task, wer = ("asr", "vsr", "avsr")[number % 3], float(20 + rng.uniform(0, 1))
        rates = f"({number + 1},{number % 5 + 1})" if task == "avsr" else f"({number + 1})"
        known: dict[str, Any] = {
            "view": f"{task}{rates}",
            "task": task,
            "rates": rates,
            "trained": True,
            "condition": "clean",
        }
        known |= {"audio_rate": 4, "video_rate": 2, "noise": None, "snr": None, "video_corruption": None}
        costs = {"llm_tokens": 40 + rng.uniform(0, 2), "real_time_factor": 0.02 + rng.uniform(0, 0.001)}
        baselines = {"chance_wer": 130.0, "untrained_wer": 21.0}
        views.append({**known, **costs, **baselines, "wer": wer, "wer_low": wer - 1, "wer_high": wer + 1})
    return views


def test_no_text_covers_another_where_points_are_crowded() -> None:
    views = crowded()
    noisy = [
        view | {"noise": noise, "snr": snr} for view in views for noise in ("babble", "/x/street") for snr in (0, 9)
    ]
    broken = [
        view | {"video_corruption": kind, "condition": kind} for view in views for kind in ("blur:0.5", "gap:0.3")
    ]
    rows = [
        {**view, "difference": 1.0, "low": -0.5, "high": 2.0, "condition": condition}
        for view in views[:9]
        for condition in ("clean", "babble 0 dB")
    ]
    for figure in (
        cost_figure(views),
        wer_figure(views),
        noise_figure([*views, *noisy]),
        corruption_figure([*views, *broken]),
        differences_figure({"a run of a long name": rows, "another": rows, "third": rows}, "the first of them all"),
        losses_figure({f"run {number}": log() for number in range(8)}),
    ):
        assert not overlaps(figure)


def log() -> TrainingLog:
    steps = [{"step": step, "loss": 3 / step, "views": {}} for step in range(1, 50)]
    return TrainingLog(list(steps), [{"step": 49, "validation": {"asr(4)": 0.2}}])


def test_ends_are_means_of_windows_that_share_no_step() -> None:
    assert Ends.of([5.0]) == Ends(5, 5, 1)
    assert Ends.of([4.0, 2.0]) == Ends(4, 2, 1)
    assert Ends.of([float(step) for step in range(40)]) == Ends(9.5, 29.5, 20)
    assert Ends.of([float(step) for step in range(1000)]) == Ends(24.5, 974.5, 50)
    assert Ends.of([0.0] * 30).window == "15 steps" and Ends.of([0.0]).window == "1 step"
