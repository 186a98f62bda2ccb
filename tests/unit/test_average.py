"""The mean of checkpoints, and which checkpoint of a run is the best."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mome_dist import evaluate, transcribe
from mome_dist.checkpoint.average import average
from mome_dist.checkpoint.format import CheckpointReader, checkpoints_of
from mome_dist.checkpoint.inspect import check
from mome_dist.checkpoint.save import prune
from mome_dist.checkpoint.saved import Saved, read_checkpoint
from mome_dist.checkpoint.select import best_checkpoint, read_saved
from mome_dist.commands import average as average_checkpoints
from mome_dist.commands import inspect as inspect_checkpoint
from mome_dist.config.schema import RunConfig
from mome_dist.data.corpus import Corpus
from mome_dist.data.media import write_media_file
from mome_dist.errors import UserError
from mome_dist.inference.load import load_run
from tests.evaluation_run import STEP, add_checkpoint, make_run

STEPS = (STEP, STEP + 3, STEP + 6)
LOSSES = {STEPS[0]: 2.0, STEPS[1]: 0.5, STEPS[2]: 0.9}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_corpus_dir: Path) -> Path:
    """A run with three checkpoints of different weights, validated at each. Do not change files in it."""
    path = make_run(tmp_path_factory.mktemp("average"), tiny_corpus_dir)
    loaded, generator = load_run(path), torch.Generator().manual_seed(3)
    config: RunConfig = read_saved(path).config
    for step in STEPS[1:]:
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        add_checkpoint(path, config, loaded.model, step)
    lines = [{"step": step, "validation": {"asr(4)": loss, "vsr(2)": loss}} for step, loss in LOSSES.items()]
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copied"))


def sources(run: Path) -> list[Saved]:
    return [read_checkpoint(path) for path in checkpoints_of(run)]


def test_the_mean_is_element_by_element_and_in_no_order(run: Path) -> None:
    saved = sources(run)
    mean, backwards = average(saved), average(saved[::-1])
    assert mean.step == STEPS[-1]
    for name, tensor in mean.weights.items():
        exact = sum(each.weights[name].double() for each in saved) / 3
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor, torch.as_tensor(exact).float())
        assert torch.equal(tensor, backwards.weights[name]), "fp64 sums of three fp32 numbers of a size are exact"
    assert all(torch.equal(tensor, saved[0].weights[name]) for name, tensor in average([saved[0]] * 3).weights.items())


def test_the_command_writes_a_whole_checkpoint(
    run: Path, tmp_path: Path, tiny_corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mean"
    assert average_checkpoints.main([str(run), str(out), "--last", "2"]) == 0
    assert f"steps {STEPS[2]}, {STEPS[1]}" in capsys.readouterr().out
    assert len(list(check(out))) == 4
    expected = average(sources(run)[:2])
    with CheckpointReader(out) as reader:
        assert [source["step"] for source in reader.index["averaged"]] == [STEPS[2], STEPS[1]]
        assert not reader.names("optimizer/")
        for name, tensor in expected.weights.items():
            assert torch.equal(reader.read(f"model/{name}"), tensor)
    assert inspect_checkpoint.main([str(out)]) == 0
    assert "no optimiser" in capsys.readouterr().out
    utterance = tiny_corpus.split("test")[0]
    write_media_file(tmp_path / "clip.mp4", tiny_corpus.audio(utterance), tiny_corpus.video(utterance))
    assert transcribe.main([str(out), str(tmp_path / "clip.mp4"), "--audio-rate", "4"]) == 0
    text = capsys.readouterr().out.strip()
    assert evaluate.main([f"checkpoint={out}", f"output={tmp_path / 'one'}", "rates=asr(4)"]) == 0
    assert evaluate.main([f"checkpoint={run}", "select=average:2", f"output={tmp_path / 'two'}", "rates=asr(4)"]) == 0
    one, two = ((tmp_path / name / "hypotheses.jsonl").read_text() for name in ("one", "two"))
    assert one == two
    assert json.loads(one.splitlines()[0])["hypothesis"] == text
    assert average_checkpoints.main([str(run), str(out)]) == 2
    assert "exists" in capsys.readouterr().err


def test_checkpoints_that_do_not_belong_together_are_refused(run: Path) -> None:
    first, second, _ = sources(run)
    config = second.config
    strangers = {
        "name or seed": replace(second, config=replace(config, seed=1)),
        "'mome'": replace(second, config=replace(config, mome=replace(config.mome, top_k=1))),
        "frozen model 'llm'": replace(second, frozen={**second.frozen, "llm": "another"}),
        "tensor": replace(second, weights=dict(list(second.weights.items())[1:])),
    }
    for named, stranger in strangers.items():
        with pytest.raises(UserError, match=f"cannot be averaged: .*{named}.* differs"):
            average([first, stranger])


def test_best_is_the_lowest_validation_loss(run: Path, copied: Path) -> None:
    assert best_checkpoint(run).name == f"step-{STEPS[1]:06d}"
    assert load_run(run, select="best").step == STEPS[1]
    assert load_run(run).step == STEPS[2]
    metrics = copied / "metrics.jsonl"
    # Between two checkpoints, and not a number: neither says anything about a checkpoint.
    metrics.write_text('{"step": 8, "validation": {"asr(4)": 0.1}}\n{"step": 10, "validation": {"asr(4)": NaN}}\n')
    with pytest.raises(UserError, match="validate_every"):
        best_checkpoint(copied)


def test_the_best_is_kept_beside_the_newest(copied: Path) -> None:
    prune(copied, 1)
    assert [path.name for path in checkpoints_of(copied)] == [f"step-{STEPS[2]:06d}", f"step-{STEPS[1]:06d}"]
    (copied / "metrics.jsonl").unlink()
    prune(copied, 1)
    assert [path.name for path in checkpoints_of(copied)] == [f"step-{STEPS[2]:06d}"]


@pytest.mark.parametrize(
    ("select", "named"),
    [("worst", "latest, best or average"), ("average:0", "1 to 3"), ("average:9", "has 3 checkpoints")],
)
def test_wrong_choices_are_named(run: Path, select: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        load_run(run, select=select)


def test_a_single_checkpoint_has_no_best(run: Path) -> None:
    with pytest.raises(UserError, match="directory of a run"):
        load_run(checkpoints_of(run)[0], select="best")
