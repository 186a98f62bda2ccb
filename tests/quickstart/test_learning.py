"""The pipeline learns: a small speech recogniser from nothing but the commands, on unseen speakers and sentences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.quickstart.newcomer import Newcomer

LOCAL = "mome-dist launch --nproc 2"


@pytest.mark.quickstart
@pytest.mark.timeout(1200)
def test_asr_learns_unseen_sentences_of_unseen_speakers(tmp_path: Path) -> None:
    newcomer = Newcomer.arrive(tmp_path, forks=True)  # that they start by themselves is what test_commands shows
    corpus = newcomer.default_corpus()
    newcomer.run(f"mome-dist prepare synthetic --train 288 --validation 16 --test 24 --out {corpus}")
    newcomer.run(f"{LOCAL} pretrain llm --steps 160")
    small = "task=asr task.asr_audio_rates=[4,16] training.steps=90 optimizer.warmup_steps=10"
    newcomer.run(f"{LOCAL} train experiment=tiny {small}")
    newcomer.run(f"{LOCAL} evaluate runs/tiny baselines=[chance,untrained]")
    results = json.loads((tmp_path / "runs/tiny/evaluation/results.json").read_text())
    wer = {row["view"]: row for row in results["views"]}
    # Whisper hears nearly every word; what is left is what 288 sentences of training do not cover.
    assert wer["asr(4)"]["wer"] < 20
    assert wer["asr(4)"]["chance_wer"] > 50 and wer["asr(4)"]["untrained_wer"] > 50
