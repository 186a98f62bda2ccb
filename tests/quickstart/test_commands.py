"""Every command that the README names runs, in the README's order, on a small corpus and for a few steps.

The commands are read from the README itself; a command without an entry in `SHRINK` fails the test, so documentation
cannot drift from what is tested.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from tests.avhubert_checkpoint import small
from tests.face_films import write_lists, write_lrs2, write_lrs3
from tests.quickstart.newcomer import ROOT, Newcomer

COMMAND = re.compile(r"^(?:\|[^|]*\| `)?(python (?:-m|tools/)[^`#\n]*)", re.MULTILINE)
SMALL_RUN = ["data.batch_size=8", "training.steps=3", "training.save_every=0", "training.validate_every=3"]

# What makes each documented command small; the key is the start of the command.
SHRINK = {
    "python tools/fetch_assets.py": [],
    "python tools/prepare_lrs.py lrs3": ["--workers", "1", "--limit", "2"],
    "python tools/prepare_lrs.py lrs2": ["--workers", "1", "--limit", "1"],
    "python tools/prepare_lrs.py manifests": ["--workers", "1", "--validation-share", "0"],
    "python tools/make_corpus.py": ["--train", "48", "--validation", "8", "--test", "6"],
    "python -m launchers.local --nproc 2 --module mome_dist.pretrain_video": ["--steps", "2"],
    "python -m launchers.local --nproc 2 --module mome_dist.pretrain_llm": ["--steps", "2"],
    "python -m launchers.local --nproc 2 experiment=quickstart": SMALL_RUN,
    "python -m launchers.local --nproc 2 experiment=tiny": SMALL_RUN,
    "python -m launchers.local --nproc 2 experiment=tiny_noise": SMALL_RUN,
    "python -m launchers.local --nproc 2 --restarts 3 experiment=tiny": [*SMALL_RUN, "output_dir=runs/restarts"],
    "python tools/fault_drill.py --shrink experiment=tiny": ["--only", "kill"],
    "python -m launchers.local --nproc 4 experiment=tiny": [*SMALL_RUN, "output_dir=runs/tp2_pp2"],
    "python -m mome_dist.train experiment=tiny": ["output_dir=runs/one", "data.batch_size=4", "training.steps=2"],
    "python -m mome_dist.train experiment=tiny parallel=single data.batch_size=null": [
        "output_dir=runs/frames",
        "data.max_frames=1500",
        "training.epochs=1",
    ],
    "python -m launchers.local --nproc 2 --module mome_dist.evaluate checkpoint=runs/quickstart": ["limit=2"],
    "python -m launchers.local --nproc 2 --module mome_dist.evaluate checkpoint=runs/tiny": ["limit=6"],
    "python -m mome_dist.evaluate checkpoint=runs/tiny noise": ["limit=2", "num_beams=2"],
    "python -m mome_dist.evaluate checkpoint=runs/tiny select": ["limit=2", "noise=clean"],
    "python tools/average_checkpoints.py runs/quickstart": ["--last", "1"],
    "python -m mome_dist.report runs/quickstart": [],
    "python -m mome_dist.transcribe runs/quickstart": [],
    "python tools/export_adapter.py runs/quickstart": [],
    "python tools/export_adapter.py runs/tiny_mss": [],
    "python -m mome_dist.transcribe exports/quickstart": [],
    "python tools/reshard_checkpoint.py runs/tiny": [],
    "python tools/reshard_checkpoint.py native/tiny": [],
    "python tools/inspect_checkpoint.py runs/quickstart": [],
    "python tools/verify_layouts.py --shrink experiment=tiny": ["--only", "dp2 zero1", "--optimizer", "sgd"],
    "python tools/verify_layouts.py --shrink --nproc 4": ["--optimizer", "sgd"],
    "python -m launchers.local --nproc 2 --module tools.check_cluster": [],
    "python tools/plan_layout.py --measured cluster.json": [],
    "python tools/plan_layout.py --gpu h100": ["--top", "1"],
    "python tools/convert_avhubert.py CHECKPOINT.pt": ["--output", "avhubert"],
    "python -m launchers.local --nproc 2 --module tools.cache_features": [],
    "python tools/tune_deepspeed.py": ["--steps", "1", "--rounds", "1", "--most", "1", "data.batch_size=8"],
}


# These need a cluster: tests/slurm/test_train.py runs them.
ON_A_CLUSTER = ("python -m launchers.slurm", "python -m launchers.submitit")


def documented_commands() -> list[str]:
    """The README's commands that need no cluster, in order."""
    commands = [match.strip() for match in COMMAND.findall((ROOT / "README.md").read_text())]
    return [command for command in commands if not command.startswith(ON_A_CLUSTER)]


def shrunk(command: str) -> list[str]:
    """Arguments of a documented command with what makes it small."""
    starts = [start for start in SHRINK if command.startswith(start)]
    assert starts, f"README names a command that no test runs: {command}"
    return [*shlex.split(command), *SHRINK[max(starts, key=len)]]


def test_every_documented_command_is_known() -> None:
    used = {max((start for start in SHRINK if command.startswith(start)), key=len) for command in documented_commands()}
    assert used == set(SHRINK)


@pytest.mark.quickstart
@pytest.mark.timeout(1200)
def test_the_readme_from_top_to_bottom(tmp_path: Path) -> None:
    newcomer = Newcomer.arrive(tmp_path)
    corpus = newcomer.default_corpus()
    write_lrs3(tmp_path / "LRS3")
    write_lrs2(tmp_path / "LRS2")
    write_lists(tmp_path / "MINE")
    settings = {"encoder_attention_heads": 4, "layer_norm_first": True}
    torch.save({"model": small().state_dict(), "cfg": {"model": settings}}, tmp_path / "CHECKPOINT.pt")
    for command in sorted(documented_commands(), key=_stage):
        arguments = shrunk(command)
        if "tools/make_corpus.py" in arguments:
            arguments += ["--out", str(corpus)]  # a small corpus where the configuration expects the default one
        arguments = [str(corpus / "samples/test-00000.mp4") if word == "CLIP.mp4" else word for word in arguments]
        output = newcomer.run(arguments)
        if "mome_dist.transcribe" in command:
            assert output.count("\n") == 1, "the text, and nothing else, on standard output"
    runs = tmp_path / "runs"
    results = json.loads((runs / "quickstart/evaluation/results.json").read_text())
    assert "avsr" in json.dumps(results) and (runs / "quickstart/report/report.md").is_file()
    assert len(list((runs / "quickstart/report").glob("*.png"))) >= 4
    one, four = ((runs / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "tp2_pp2"))
    assert len(one) >= 2 and len(four) >= 3


def _stage(command: str) -> int:
    """The tiny LLM has to exist before anything trains with it; all else keeps the README's order."""
    needs_a_run = any(
        f"tools/{name}" in command for name in ("export_adapter", "reshard_check", "inspect_check", "average_check")
    )
    return 0 if "pretrain" in command or ("tools" in command and not needs_a_run) else 1
