"""Mixtures of projectors in layouts against one process, and through the life of a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mome_dist import report as report_command
from mome_dist import transcribe
from mome_dist.checkpoint.format import CheckpointReader, checkpoints_of
from mome_dist.checkpoint.reshard import reshard
from mome_dist.config import load_config
from mome_dist.data.corpus import Corpus
from mome_dist.data.media import encode_flac
from mome_dist.errors import UserError
from mome_dist.export.adapter import export_adapter, export_checkpoint
from mome_dist.inference.load import load_run
from mome_dist.moe.load import PassLoad
from mome_dist.parallel.layout import Layout
from mome_dist.preflight import validate
from mome_dist.speech import balance
from mome_dist.training import loop
from mome_dist.verification.cases import standard_cases
from mome_dist.verification.probe import Probe, shrunk
from mome_dist.verification.verify import Verdict, Verifier
from tests.parallel.runs import Lab, lines
from tests.parallel.worlds import run_world

pytestmark = pytest.mark.parallel
# Coefficients that show: of the router's gradient, most is the losses'.
PROBE = [
    "experiment=tiny",
    "llm.precision=fp32",
    "parallel=single",
    "projector=smop",
    "projector.mixture.balance_loss=0.3",
    "projector.mixture.z_loss=0.1",
    "task.asr_audio_rates=[4]",
    "task.vsr_video_rates=[2]",
    "task.avsr_audio_rates=[4]",
    "task.avsr_video_rates=[5]",
]
JEJR, DEJR, DEDR = (f"projector.mixture.form={form}" for form in ("jejr", "dejr", "dedr"))
CASES = {case.name: case for case in standard_cases()}


def _check(folder: Path, case: str, *more: str, plant: bool = False) -> Verdict:
    probe = Probe(shrunk(load_config([*PROBE, *more]), folder), steps=3)
    return Verifier(probe).check(CASES[case], "sgd", _count_own_tokens_only if plant else None)


@pytest.mark.parametrize(
    ("case", "more"),
    [
        ("dp2 zero0", [JEJR, "mome=none"]),
        ("tp2 sp", [DEJR, "mome=none"]),
        ("pp2 zero0", [DEDR, "mome=none", "projector.layer_norm=false"]),
        ("pp2 interleaved", [JEJR, "mome=none", "task.tasks=[avsr]"]),
        ("dp2 zero2", [DEDR, "mome=none", "data.batch_size=null"]),
        ("tp2 ep2 sp", [DEDR]),
    ],
)
def test_layouts_train_as_one_process(tmp_path: Path, case: str, more: list[str]) -> None:
    verdict = _check(tmp_path, case, *more)
    assert verdict.passed, (verdict.failure, verdict.comparison)


def _count_own_tokens_only() -> None:
    balance.PassLoad = lambda views, group, share: PassLoad(views, None, share)  # type: ignore[assignment,misc]


def test_counts_of_a_rank_alone_are_seen_to_be_wrong(tmp_path: Path) -> None:
    verdict = _check(tmp_path, "dp2 zero0", JEJR, "mome=none", plant=True)
    assert verdict.comparison is not None and not verdict.passed
    assert "routers" in verdict.comparison.mismatches[0].name


def test_a_shared_router_of_unequal_encoders_is_refused_before_anything_starts(lab: Lab, tmp_path: Path) -> None:
    config = load_config(lab.overrides(tmp_path, "mome=none", "parallel=single", "projector=smop", JEJR))
    with pytest.raises(UserError, match=r"form=jejr .*\(48 of audio, 32 of video\): set projector.mixture.form=dedr"):
        validate(config, 1)
    config.task.tasks = ["asr"]
    validate(config, 1)


def _from_there_on(run: Path, folder: Path, sound: Path, cache: Path) -> str:
    """Export a run in two ways, report on it, and write down a file with the export."""
    os.environ["MOME_DIST_CACHE"] = str(cache)
    export_adapter(run, folder / "export")
    export_checkpoint(folder / "native", folder / "export of native")
    here, there = load_run(str(run)), load_run(folder / "export")
    assert here.config.projector == there.config.projector
    for (name, mine), theirs in zip(here.model.named_parameters(), there.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert report_command.main([f"run={run}"]) == 0
    assert transcribe.main([str(folder / "export"), str(sound), "--audio-rate", "4"]) == 0
    return (folder / "export/README.md").read_text()


def test_a_run_goes_on_elsewhere_and_is_exported(
    lab: Lab, tiny_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "ROUTING_EVERY", 2)
    run, more = tmp_path / "run", ["mome=none", "projector=smop", "projector.hidden_size=32", DEDR]
    more += ["projector.layer_norm=false", "optimizer.final_fraction=1"]
    straight = lab.train(2, tmp_path / "straight", *more, "training.steps=6")
    lab.train(2, run, *more, "training.steps=3")
    assert lab.train(4, run, *more, "training.steps=6", tp=2, pp=2) == pytest.approx(straight[3:], rel=1e-5)

    records = lines(run / "metrics.jsonl")
    shares = [line["projector_experts"] for line in records if "projector_experts" in line]
    assert len(shares) == 3 and {name.partition(".")[0] for name in shares[0]} == {"audio", "video"}
    assert all(sum(each.values()) == pytest.approx(2) for each in shares), "of each router one"

    newest = checkpoints_of(run)[0]
    with CheckpointReader(newest) as reader:
        names = reader.names("model/projectors.mixture.experts.audio")
    assert names and not any(name.endswith(".3.weight") for name in names)
    reshard(newest, tmp_path / "native", "deepspeed", Layout.for_world(4, tp=2, pp=2), 1)
    sound = tmp_path / "sound.flac"
    sound.write_bytes(encode_flac(tiny_corpus.audio(tiny_corpus.split("test")[0])))
    card = run_world(_from_there_on, 1, run, tmp_path, sound, lab.cache)[0]
    told = "DEDR mixture of 4 experts, 2 a token, balance loss 0.01, z-loss 0.001"
    assert f"- Projectors: {told}." in card and "do not end in a layer norm" in card
    one, other = (tmp_path / name / "model.safetensors" for name in ("export", "export of native"))
    assert one.read_bytes() == other.read_bytes()
    page = (run / "report/report.md").read_text()
    loads = ", ".join(f"{shares[-1][f'audio.{number}']:.0%}" for number in range(4))
    assert f"without layer norm, {told}" in page and f"| load of the projectors of audio | {loads} |" in page
