"""Running one trial and surviving whatever it does: a crash, no memory, no end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mome_dist.config.deepspeed.file import settled
from mome_dist.config.derived import layout_of
from mome_dist.config.load import load_config
from mome_dist.files import write_json
from mome_dist.text_files import lines_of
from mome_dist.tuning.outcome import WARM_UP_STEPS, Outcome, TimedStep
from mome_dist.tuning.space import Trial

NO_MEMORY = re.compile(r"out of memory|can't allocate memory|Cannot allocate memory|MemoryError|bad_alloc", re.I)


class Runner(Protocol):
    """Runs trials."""

    def run(self, trial: Trial) -> Outcome:
        """Run a trial from its start, once."""


@dataclass(frozen=True)
class LaunchedRunner:
    """Runs trials as the user's own job, in processes of their own.

    Attributes:
        overrides: of the job.
        nproc: processes.
        steps: that count.
        timeout: seconds until a trial is ended.
    """

    overrides: tuple[str, ...]
    nproc: int
    steps: int
    timeout: float

    def run(self, trial: Trial) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="mome_dist-tuning-") as folder:
            file, output = Path(folder) / "deepspeed.json", Path(folder) / "run"
            write_json(file, trial.deepspeed)
            own = [
                f"deepspeed.file={file}",
                f"output_dir={output}",
                f"training.steps={WARM_UP_STEPS + self.steps}",
                "training.epochs=null",
                "training.save_every=0",
                "training.validate_every=0",
                "training.resume=false",
            ]
            command = [sys.executable, "-m", "mome_dist.launchers.local", "--nproc", str(self.nproc)]
            command += ["--timeout", str(self.timeout), *self.overrides, *trial.arguments(), *own]
            code, text = _run(command, self.timeout + 30)
            if code:
                return Outcome(failure=explain(code, text))
            records = [json.loads(line) for line in lines_of(output / "metrics.jsonl")]
        steps = [
            TimedStep(record["seconds"], record["loss"], record["gradient_norm"])
            for record in records
            if "seconds" in record
        ]
        return Outcome(tuple(steps))


def _run(command: Sequence[str], timeout: float) -> tuple[int, str]:
    """Exit code and output of a command that is ended with all its children when time runs out."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException as error:
        # The launcher ends its ranks when it is asked to; the kernel does if it is killed.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
        process.kill()
        output, _ = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
    return process.returncode, output.decode(errors="replace")


def explain(code: int, text: str) -> str:
    """A line that says why a trial failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any(NO_MEMORY.search(line) for line in lines) or code == 137:  # 128 + SIGKILL: the kernel's answer to no memory
        return "out of memory"
    if code == 124:
        return "no end in time"
    errors = [line for line in lines if re.match(r"(\[rank \d+\] )?[\w.]*(Error|error|Exception)\b.*: ", line)]
    return (errors or lines or [f"exit code {code}"])[-1][:200]


@dataclass(frozen=True)
class ForkedRunner:
    """Runs trials on a small random model in forked processes: a second a trial, on this machine's CPU.

    Attributes:
        overrides: of the job, whose layout and modules are kept in small.
        nproc: processes.
        steps: that count.
        timeout: seconds until a trial is ended.
        llm: folder for the random LLM.
    """

    overrides: tuple[str, ...]
    nproc: int
    steps: int
    timeout: float
    llm: Path

    def run(self, trial: Trial) -> Outcome:
        from mome_dist.parallel.forked import run_forked
        from mome_dist.tuning.forked import timed_steps

        config = load_config([*self.overrides, *trial.arguments()])
        deepspeed = settled(trial.deepspeed, config, layout_of(config, self.nproc).dp, trial.name)
        arguments = (config, self.llm, deepspeed.acts, WARM_UP_STEPS + self.steps)
        try:
            steps = run_forked(timed_steps, self.nproc, *arguments, timeout=self.timeout)
        except RuntimeError as error:
            return Outcome(failure=explain(1, str(error)))
        return Outcome(tuple(steps[0]))
