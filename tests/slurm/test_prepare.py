"""The documented job array that prepares a data set: tasks share the work, and the last one joins it."""

from __future__ import annotations

import pytest

from mome_dist.assets import assets_root
from mome_dist.data.corpus import Corpus
from tests.face_films import write_lrs2
from tests.slurm import readme
from tests.slurm.desk import Desk, Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]


def test_a_job_array_makes_one_corpus(desk: Desk) -> None:
    write_lrs2(desk.folder / "LRS2")
    desk.lab.cache.mkdir(exist_ok=True)
    (desk.lab.cache / "assets").symlink_to(assets_root())
    command = readme.command(readme.PREPARE)
    command[1:3] = ["--parsable", "--wait", "--array=1-3:2", "--cpus-per-task=1"]
    words = [{"lrs3": "lrs2", "LRS3": "LRS2", "corpora/lrs3": "corpora/lrs2"}.get(word, word) for word in command]
    job = desk.run([*words, "--clips-per-shard", "1"], timeout=120).stdout.strip()
    assert Job(desk, job, desk.folder).accounted(2) == ["COMPLETED", "COMPLETED"]
    told = [(desk.folder / f"slurm-{job}_{task}.out").read_text() for task in (1, 3)]
    assert all("2 of 2 clips" in text for text in told), "each task has done two of the four shards"
    corpus = Corpus.open(desk.folder / "corpora/lrs2")
    corpus.verify()
    assert [len(corpus.split(name)) for name in ("train", "validation", "test")] == [2, 1, 1]
    assert not (desk.folder / "corpora/lrs2.preparing").exists()
