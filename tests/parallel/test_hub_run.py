"""A run whose LLM is on the hub: trained, and resumed after its branch has moved, each by new processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mome_dist.config.load import load_saved_config
from tests.evaluation_run import make_run
from tests.hub_server import Repository, serving, use_hub


def test_ranks_find_what_the_launcher_fetched(
    tiny_corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "made", tiny_corpus_dir)
    with serving() as hub:
        repository = hub.repositories["owner/llm"] = Repository()
        began = repository.commit(tmp_path / "made/llm")
        # Ranks may use the network as well here, and do not.
        variables = use_hub(hub.address, tmp_path / "home", monkeypatch)
        environment = {**os.environ, **variables, "MOME_DIST_CACHE": str(tmp_path / "cache")}

        def asked() -> list[str]:
            """What was asked about the model since the last call."""
            lines = [line for line in hub.asked if "owner/llm" in line]
            hub.asked.clear()
            return sorted(lines)

        def train(*command: str) -> str:
            command = (sys.executable, "-m", *command, *job)
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout + done.stderr

        run = tmp_path / "run"
        job = ["experiment=tiny", "task=vsr", "parallel=single", f"data.corpus={tiny_corpus_dir}", "data.batch_size=4"]
        job += ["training.validate_every=0", "training.save_every=1", "optimizer.warmup_steps=0"]
        job += ["mome.routed_experts=4", "mome.top_k=2", "mome.dispatch=local", "projector.hidden_size=16"]
        job += [f"video_encoder.path={tmp_path / 'made/lips'}", f"output_dir={run}", "llm.path=hf://owner/llm"]
        train("launchers.local", "--nproc", "2", "training.steps=1")
        assert load_saved_config(run / "config.yaml").llm.path == f"hf://owner/llm@{began}"
        first = asked()
        assert len(first) == len(set(first)) and "GET /api/models/owner/llm/revision/main" in first

        moved = repository.commit(shutil.copytree(tmp_path / "made/llm", tmp_path / "moved"))
        assert moved != began
        told = train("mome_dist.train", "training.steps=2")
        assert f"hf://owner/llm is hf://owner/llm@{began}" in told and "resumed after step 1" in told
        assert asked() == []
        saved = load_saved_config(run / "checkpoints/step-000002/config.yaml")
        assert saved.llm.path == f"hf://owner/llm@{began}"
