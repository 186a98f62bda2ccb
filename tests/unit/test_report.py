"""Reports: figures of load and consistency in closed form, logs with faults in them, and the page itself."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from mome_dist import evaluate, report
from mome_dist.config.load import load_config, save_config
from mome_dist.errors import UserError
from mome_dist.evaluation.activations import Activations
from mome_dist.evaluation.conflict_plots import conflict_figure
from mome_dist.evaluation.consistency import (
    agreement,
    agreement_between_rates,
    agreement_matrix,
    agreement_of_views,
    profiles,
)
from mome_dist.evaluation.report import write_report
from mome_dist.evaluation.run_files import RunFiles
from mome_dist.training_log import ConflictLog, RoutingLog, TrainingLog, imbalance, normalized_entropy, smoothed
from tests.evaluation_run import make_run


def test_load_figures_in_closed_form() -> None:
    counts = np.array([[5.0, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0], [0, 0, 0, 0]])
    assert imbalance(counts)[:3].tolist() == [1, 4, 2]
    assert normalized_entropy(counts)[:3] == pytest.approx([1, 0, 0.5])
    assert np.isnan(imbalance(counts)[3])


def test_agreement_in_closed_form() -> None:
    p, q = np.array([0.5, 0.5, 0, 0]), np.array([0, 0, 0.5, 0.5])
    assert agreement(p, p) == pytest.approx(1)
    assert agreement(p, q) == pytest.approx(0)
    # JSD([1, 0], [1/2, 1/2]) = 1/2 log2(4/3) + 1/2 (1/2 log2(2/3) + 1/2 log2 2)
    expected = 1 - (0.5 * np.log2(4 / 3) + 0.25 * np.log2(2 / 3) + 0.25)
    assert agreement(np.array([1.0, 0]), np.array([0.5, 0.5])) == pytest.approx(expected)


def test_rates_are_compared_within_a_modality() -> None:
    counts = torch.zeros(1, 3, 3, 4, dtype=torch.int64)
    counts[0, 0, 0], counts[0, 1, 0] = torch.tensor([4, 4, 0, 0]), torch.tensor([1, 1, 0, 0])  # asr(4), asr(16)
    counts[0, 2, 0], counts[0, 2, 1] = torch.tensor([0, 0, 2, 2]), torch.tensor([0, 0, 3, 3])  # avsr(4,2)
    found = profiles(Activations(counts, ("asr(4)", "asr(16)", "avsr(4,2)"), 1))
    assert [(p.view, p.modality, p.rate) for p in found] == [
        ("asr(4)", "audio", 4),
        ("asr(16)", "audio", 16),
        ("avsr(4,2)", "audio", 4),
        ("avsr(4,2)", "video", 2),
    ]
    curves = agreement_between_rates(found)
    # 4 against 16 in ASR: 1; ASR's 16 against AVSR's 4: 0; the two of rate 4 are no pair of rates.
    assert curves["audio"] == pytest.approx([0.5])
    assert curves["audio against video"] == pytest.approx([1 / 3])
    assert set(curves) == {"audio", "audio against video"}
    assert agreement_matrix(found) == pytest.approx(np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]))


def test_smoothing() -> None:
    assert smoothed(np.arange(20.0), 5)[2:-2] == pytest.approx(np.arange(2.0, 18))
    assert smoothed(np.array([0.0, 3, 0]), 3) == pytest.approx([1.5, 1, 1.5])
    assert len(smoothed(np.zeros(0), 5)) == 0


def test_a_log_with_a_resume_and_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"step": step, "loss": 10.0 - step, "views": {"asr(4)": 1.0}} for step in range(1, 6)]
    records += [{"step": 5, "validation": {"asr(4)": 2.0, "vsr(2)": 4.0}}]
    records += [{"step": 3, "loss": 100.0, "views": {"vsr(2)": 7.0}}]  # resumed from step 2
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 4, "lo')
    log = TrainingLog.read(path)
    assert [values.tolist() for values in log.series("loss")] == [[1, 2, 3], [9, 8, 100]]
    assert log.view_series("vsr(2)")[1].tolist() == [7]
    assert log.validation_series(None)[1].tolist() == [3]
    assert log.views() == ["asr(4)", "vsr(2)"]
    assert TrainingLog.read(tmp_path / "absent").steps == []


def test_drop_rate(tmp_path: Path) -> None:
    path = tmp_path / "routing.jsonl"
    path.write_text(json.dumps({"step": 10, "asked": [[6, 2], [4, 4]], "dropped": [[2, 0], [0, 0]]}) + "\n")
    log = RoutingLog.read(path)
    assert log is not None
    assert log.drop_rate().tolist() == [[25, 0]]
    assert log.views == () and log.tokens.tolist() == [0]
    assert RoutingLog.read(tmp_path / "absent") is None


def test_cosines_of_views_over_lines_that_have_different_views(tmp_path: Path) -> None:
    path = tmp_path / "conflicts.jsonl"
    lines = [
        {"step": 1, "views": ["asr(16)", "asr(4)"], "pairs": [[0, 1]], "experts": [[[0.5, None], [-0.1, 0.2]]]},
        {"step": 2, "views": ["asr(4)", "vsr(2)"], "pairs": [[0, 1]], "experts": [[[-1.0, None], [None, None]]]},
    ]
    routers = [[[0.3, None]], [[None, None]]]
    path.write_text("".join(json.dumps({**line, "router": r}) + "\n" for line, r in zip(lines, routers, strict=True)))
    log = ConflictLog.read(path)
    assert log is not None and log.lines == 2 and log.views == ("asr(4)", "asr(16)", "vsr(2)")
    nan = np.nan
    np.testing.assert_allclose(log.experts, [[1, 0.2, -1], [0.2, 1, nan], [-1, nan, 1]])
    np.testing.assert_allclose(log.router, [[1, 0.3, nan], [0.3, 1, nan], [nan, nan, 1]])
    np.testing.assert_allclose(log.negative, [[0, 1 / 3, 1], [1 / 3, 0, nan], [1, nan, 0]])
    assert len(conflict_figure(log).axes) == 3, "two panels and a scale"
    assert ConflictLog.read(tmp_path / "absent") is None


def test_views_add_up_over_checkpoints_and_are_compared_by_layer(tmp_path: Path) -> None:
    def part(tokens: int, asked: list[list[int]]) -> dict[str, object]:
        return {"tokens": tokens, "positions": 2 * tokens, "asked": asked, "dropped": [[1, 0], [0, 0]]}

    first = {"vsr(2)": part(4, [[4, 0], [2, 2]]), "asr(16)": part(6, [[6, 0], [3, 3]])}
    second = {"asr(4)": part(2, [[0, 2], [1, 1]]), "vsr(2)": part(4, [[0, 4], [0, 4]])}
    path = tmp_path / "routing.jsonl"
    with path.open("w") as file:
        for step, by_view in ((3, {"by_view": first}), (5, {}), (6, {"by_view": second})):
            file.write(json.dumps({"step": step, **part(8, [[4, 4], [4, 4]]), **by_view}) + "\n")
    log = RoutingLog.read(path)
    assert log is not None
    assert log.tokens.tolist() == [8, 8, 8] and log.positions.tolist() == [16, 16, 16]
    assert log.views == ("asr(4)", "asr(16)", "vsr(2)")
    assert log.asked_by_view.tolist() == [[[0, 2], [1, 1]], [[6, 0], [3, 3]], [[4, 4], [2, 6]]]
    assert log.dropped_by_view[:, 0, 0].tolist() == [1, 1, 2]
    assert log.tokens_by_view.tolist() == [2, 6, 8] and log.positions_by_view.tolist() == [4, 12, 16]
    agreements = agreement_of_views(log)
    assert agreements.shape == (3, 3, 2)
    assert agreements[0, 1] == pytest.approx([0, 1]), "other experts in layer 0, the same in layer 1"
    assert agreements[1, 2, 0] == pytest.approx(agreement(np.array([1.0, 0]), np.array([0.5, 0.5])))
    assert agreements == pytest.approx(agreements.transpose(1, 0, 2))


def write_logs(run: Path) -> None:
    generator = np.random.default_rng(0)
    views = ["asr(4)", "asr(16)", "vsr(2)", "vsr(5)", "avsr(4,5)"]
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 41):
            losses = {view: float(3 * np.exp(-step / 20) + generator.uniform(0, 0.3)) for view in views}
            line = {"step": step, "loss": float(np.mean(list(losses.values()))), "views": losses, "seconds": 0.5}
            file.write(json.dumps(line | {"tokens_per_second": 800.0, "learning_rate": 1e-3}) + "\n")
            if step % 10 == 0:
                file.write(json.dumps({"step": step, "validation": losses}) + "\n")
    with (run / "routing.jsonl").open("w") as file:
        for step in range(10, 41, 10):
            asked = generator.integers(50, 200, (2, 6)).tolist()
            record = {"tokens": 750, "positions": 1000, "asked": asked, "dropped": [[1] * 6] * 2}
            by_view = {"by_view": dict.fromkeys(views, record)} if step % 20 == 0 else {}
            file.write(json.dumps({"step": step} | record | by_view) + "\n")


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_report_before_and_after_evaluation(
    tmp_path: Path, tiny_corpus_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, tiny_corpus_dir)
    assert report.main([f"run={run}"]) == 0
    page = (run / "report" / "report.md").read_text()
    assert "Not evaluated yet" in page
    assert f"mome-dist evaluate {run}" in page
    assert "No `metrics.jsonl`" in page

    write_logs(run)
    assert evaluate.main([f"checkpoint={run}", "baselines=[chance]"]) == 0
    capsys.readouterr()
    assert report.main([f"run={run}"]) == 0
    assert capsys.readouterr().out.split() == [str(run / "report" / name) for name in ("report.md", "report.html")]
    page = (run / "report" / "report.md").read_text()
    figures = ["loss", "wer", "activations_asr", "activations_vsr", "activations_avsr", "consistency", "load"]
    for name in [*figures, "load_views", "view_agreement"]:
        assert f"({name}.png)" in page
        width, height = png_size(run / "report" / f"{name}.png")
        assert min(width, height) > 300
    table = (run / "evaluation" / "results.md").read_text().split("\n\n", 1)[1]
    assert table in page
    # 2 layers of H 32: (2 + 1) experts of 2*32*3 + 3 + 32 and a router of 32*6; all 7 experts are trained.
    assert "1,746 active per token, 3,562 trained" in page
    assert "step 40 of 100" in page
    losses = [record["loss"] for record in TrainingLog.read(run / "metrics.jsonl").steps]
    means = [
        f"{np.mean(part):.3f} (mean of the {end} 20 steps)"
        for part, end in ((losses[:20], "first"), (losses[20:], "last"))
    ]
    assert f"| training loss | {' to '.join(means)} |" in page
    assert "| router | softmax scores, renormalised; balance loss 0.01, z-loss 0 |" in page
    assert "Training routed 3,000 tokens in every layer; 25.0 % of all positions were padding" in page
    assert "| avsr(4,5) | 1,500 | 25.0 |" in page
    assert {path.suffix for path in (run / "report").iterdir()} == {".md", ".html", ".png"}
    html = (run / "report" / "report.html").read_text()
    assert html.count('src="data:image/png;base64,') == html.count("<img") == len(list((run / "report").glob("*.png")))


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([f"run={tmp_path}"]) == 2
    assert "is an empty folder; name a run" in capsys.readouterr().err
    assert report.main([]) == 2
    assert "runs/NAME" in capsys.readouterr().err


def test_damaged_results_are_named(tmp_path: Path, tiny_corpus_dir: Path) -> None:
    run = make_run(tmp_path, tiny_corpus_dir)
    (run / "evaluation").mkdir()
    (run / "evaluation" / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json"):
        RunFiles.read(run)


@pytest.mark.parametrize(("method", "baselines"), [("mome", "chance,untrained"), ("omni_avsr/st", "chance")])
def test_the_evaluation_that_a_report_names_can_be_run(tmp_path: Path, method: str, baselines: str) -> None:
    """An encoder that trains leaves no features of an untrained model, and evaluation refuses that baseline."""
    save_config(load_config(["experiment=tiny", f"method={method}"]), tmp_path / "config.yaml")
    page = write_report(tmp_path)[0].read_text()
    assert f"mome-dist evaluate {tmp_path} baselines=[{baselines}]`" in page
