"""Every command that the documentation names runs, in its order, on a small corpus and for a few steps.

The commands are read from the pages themselves; a command without an entry in `SHRINK` fails the test, so documentation
cannot drift from what is tested.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import documentation
from tests.avhubert_checkpoint import small
from tests.face_films import write_lists, write_lrs2, write_lrs3
from tests.quickstart.newcomer import Newcomer
from tests.unit import test_planning_docs

SMALL_RUN = ["data.batch_size=8", "training.steps=3", "training.save_every=0", "training.validate_every=3"]

# What makes each documented command small; the key is the start of the command.
SHRINK = {
    "mome-dist fetch": [],
    "mome-dist prepare lrs3": ["--workers", "1", "--limit", "2"],
    "mome-dist prepare lrs2": ["--workers", "1", "--limit", "1"],
    "mome-dist prepare manifests": ["--workers", "1", "--validation-share", "0"],
    "mome-dist prepare synthetic": ["--train", "48", "--validation", "8", "--test", "6"],
    "mome-dist launch --nproc 2 pretrain video": ["--steps", "2"],
    "mome-dist launch --nproc 2 pretrain llm": ["--steps", "2"],
    "mome-dist launch --nproc 2 train experiment=quickstart": SMALL_RUN,
    "mome-dist launch --nproc 2 train experiment=tiny": SMALL_RUN,
    "mome-dist launch --nproc 2 train experiment=tiny_noise": SMALL_RUN,
    "mome-dist launch --nproc 2 --restarts 3 train experiment=tiny": [*SMALL_RUN, "output_dir=runs/restarts"],
    "mome-dist drill --shrink experiment=tiny": ["--only", "kill"],
    "mome-dist launch --nproc 4 train experiment=tiny": [*SMALL_RUN, "output_dir=runs/tp2_pp2"],
    "mome-dist train experiment=tiny": ["output_dir=runs/one", "data.batch_size=4", "training.steps=2"],
    "mome-dist train experiment=tiny parallel=single data.batch_size=null": [
        "output_dir=runs/frames",
        "data.max_frames=1500",
        "training.epochs=1",
    ],
    "mome-dist launch --nproc 2 evaluate runs/quickstart": ["limit=2"],
    "mome-dist launch --nproc 2 evaluate runs/tiny": ["limit=6"],
    "mome-dist evaluate runs/tiny noise": ["limit=2", "num_beams=2"],
    "mome-dist evaluate runs/tiny select": ["limit=2", "noise=clean"],
    "mome-dist average runs/quickstart": ["--last", "1"],
    "mome-dist report runs/quickstart": [],
    "mome-dist report compare runs/tiny runs/tiny_noise": [],
    "mome-dist transcribe runs/quickstart": [],
    "mome-dist export runs/quickstart": [],
    "mome-dist export runs/tiny_mss": [],
    "mome-dist transcribe exports/quickstart": [],
    "mome-dist reshard runs/tiny": [],
    "mome-dist reshard native/tiny": [],
    "mome-dist inspect runs/quickstart": [],
    "mome-dist verify --shrink experiment=tiny": ["--only", "dp2 zero1", "--optimizer", "sgd"],
    "mome-dist verify --shrink --nproc 4": ["--optimizer", "sgd"],
    "mome-dist launch --nproc 2 check": [],
    "mome-dist plan --measured cluster.json": [],
    "mome-dist plan --gpu h100": ["--top", "1"],
    "mome-dist convert avhubert CHECKPOINT.pt": ["--output", "avhubert"],
    "mome-dist launch --nproc 2 prepare features": [],
    "mome-dist tune": ["--steps", "1", "--rounds", "1", "--most", "1", "data.batch_size=8"],
}


def documented_commands() -> list[str]:
    """The documentation's commands that need no cluster, in order, but for plans: another test holds their output."""
    plans = test_planning_docs.documented_commands()
    return [command for command, _ in documentation.commands(cluster=False) if command not in plans]


def shrunk(command: str) -> list[str]:
    """Arguments of a documented command with what makes it small."""
    starts = [start for start in SHRINK if command.startswith(start)]
    assert starts, f"the documentation names a command that no test runs: {command}"
    return [*documentation.words_of(command), *SHRINK[max(starts, key=len)]]


def test_every_documented_command_is_known() -> None:
    used = {max((start for start in SHRINK if command.startswith(start)), key=len) for command in documented_commands()}
    assert used == set(SHRINK)


@pytest.mark.quickstart
@pytest.mark.timeout(1200)
def test_the_documentation_from_top_to_bottom(tmp_path: Path) -> None:
    newcomer = Newcomer.arrive(tmp_path)
    corpus = newcomer.default_corpus()
    write_lrs3(tmp_path / "LRS3")
    write_lrs2(tmp_path / "LRS2")
    write_lists(tmp_path / "MINE")
    settings = {"encoder_attention_heads": 4, "layer_norm_first": True}
    torch.save({"model": small().state_dict(), "cfg": {"model": settings}}, tmp_path / "CHECKPOINT.pt")
    for command in sorted(documented_commands(), key=_stage):
        arguments = shrunk(command)
        if command == "mome-dist prepare synthetic":
            arguments += ["--out", str(corpus)]  # a small corpus where the configuration expects the default one
        arguments = [str(corpus / "samples/test-00000.mp4") if word == "CLIP.mp4" else word for word in arguments]
        output = newcomer.run(arguments)
        if command.startswith("mome-dist transcribe"):
            assert output.count("\n") == 1, "the text, and nothing else, on standard output"
    runs = tmp_path / "runs"
    results = json.loads((runs / "quickstart/evaluation/results.json").read_text())
    assert "avsr" in json.dumps(results) and (runs / "quickstart/report/report.md").is_file()
    assert len(list((runs / "quickstart/report").glob("*.png"))) >= 4
    one, four = ((runs / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "tp2_pp2"))
    assert len(one) >= 2 and len(four) >= 3


def _stage(command: str) -> int:
    """The tiny LLM has to exist before anything trains with it; all else keeps the order of the pages."""
    needs_no_run = ("fetch", "prepare", "pretrain", "convert", "check", "plan", "tune", "verify", "drill")
    words = command.split()
    return 0 if words[1] in needs_no_run or (words[1] == "launch" and {*needs_no_run} & {*words}) else 1
