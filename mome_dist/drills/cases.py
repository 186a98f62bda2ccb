"""The faults of a drill: what happens in which start of a run, and what must be seen."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mome_dist.checkpoint.format import newest_checkpoint
from mome_dist.drills.bench import SAVE_EVERY, Bench
from mome_dist.drills.injection import FILE_LIMIT, NOT_FINITE, SAVING, Injection
from mome_dist.exit_codes import PREEMPTED, RANK_LOST, USER_ERROR

KILLED = 128 + 9
LATEST_KILL_SECONDS = 0.25  # after a save began; the longest that one takes here, and a little of the next step
# fp32 rounds at 6e-8; another number of processes adds the same terms up in another order (see verification.compare).
TOLERANCE = 1e-5
FAULTS = {
    "sigterm": "a scheduler asks one rank to stop",
    "sigusr1": "a scheduler's time limit is near",
    "non-finite": "a gradient is not a number once: the step is skipped",
    "non-finite-limit": "it stays so: the run stops and names the utterances",
    "kill": "one rank is killed in the middle of a step",
    "kill-two": "two ranks are killed at once",
    "hang": "one rank hangs: the others name it after the timeout",
    "half": "the run goes on with half the processes",
    "truncated-shard": "a shard is cut short: refused by name",
    "corrupted-shard": "bits flip in a shard: refused, the utterances are named",
    "corrupted-shard-left-out": "the same, and these utterances may be left out",
    "full-disk": "the disk is full while a checkpoint is written",
    "damaged-checkpoint": "the newest checkpoint is damaged: the one before is used",
    "torn-metrics": "a kill leaves half a line in the metrics",
    "kill-while-saving": "kills at random moments of a save",
}


@dataclass(frozen=True)
class Start:
    """One start of a run.

    Attributes:
        injections: what happens to it.
        codes: exit codes that it may end with.
        says: a pattern that must be in what its ranks print.
        overrides: of this start only.
        processes: other than the drill's.
        before: done to the run's directory first.
    """

    injections: tuple[Injection, ...] = ()
    codes: tuple[int, ...] = (0,)
    says: str = ""
    overrides: tuple[str, ...] = ()
    processes: int | None = None
    before: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Case:
    """A fault and the starts of its run, the last of which must end well.

    Attributes:
        overrides: of all starts, and of the unbroken run if the case has its own.
        own_reference: compare with an unbroken run under ``overrides`` instead of the ordinary one.
        tolerance: on losses, relative; 0 asks for equal bits.
        skipped: steps that must have been skipped; the curve is compared up to them.
        cache: features are encoded anew into a cache of this name.
        left_out: ids that must not be trained on.
    """

    name: str
    starts: tuple[Start, ...]
    overrides: tuple[str, ...] = ()
    own_reference: bool = False
    tolerance: float = 0.0
    skipped: tuple[int, ...] = ()
    cache: str = "cache"
    left_out: tuple[str, ...] = ()


def all_cases(bench: Bench, kills: int, seed: int) -> dict[str, Callable[[], Case]]:
    """Every fault by name; a case is made, with what it damages, when it is called."""
    lost = (KILLED, RANK_LOST)

    def stopped(name: str, kind: str) -> Case:
        told = Start((Injection(kind, 1, 2),), (PREEMPTED,), "asked to stop: saved after step 3")
        return Case(name, (told, Start()))

    def skipped() -> Case:
        return Case(
            "non-finite gradient", (Start((Injection(NOT_FINITE, 0, 3),), says="step 4 was skipped"),), skipped=(4,)
        )

    def over_the_limit() -> Case:
        twice = tuple(Injection(NOT_FINITE, 0, step) for step in (3, 4))
        limit = ("training.max_skipped_steps=1",)
        return Case("non-finite over the limit", (Start(twice, (USER_ERROR,), "2 in a row", limit), Start()))

    def killed() -> Case:
        return Case("kill -9 of one rank", (Start((Injection("SIGKILL", 1, 3),), lost), Start()))

    def two_killed() -> Case:
        many = 2 * bench.processes
        both = tuple(Injection("SIGKILL", rank, 3) for rank in (1, 2))
        starts = (Start(both, lost, processes=many), Start(processes=many))
        return Case("two ranks lost at once", starts, tolerance=TOLERANCE)

    def hanging() -> Case:
        told = r"rank 1 \(.*\) is silent: in step 4, 'forward and backward'"
        timeout = ("parallel.timeout_seconds=5",)  # more than a rank of a busy machine is late
        return Case("SIGSTOP of a rank", (Start((Injection("SIGSTOP", 1, 3),), (RANK_LOST,), told, timeout), Start()))

    def halved() -> Case:
        half = Start(overrides=tuple(bench.halved()), processes=bench.processes // 2)
        told = Start((Injection("SIGUSR1", 0, 2),), (PREEMPTED,))
        return Case("half the processes", (told, half), tolerance=TOLERANCE)

    def truncated() -> Case:
        corpus, shard = bench.damaged_corpus("truncated", bench.trained_in_step(1)[0].shard)
        content = shard.read_bytes()
        shard.write_bytes(content[: len(content) // 2])
        mended = Start(before=lambda _: _write(shard, content))
        refused = Start(codes=(USER_ERROR,), says=f"{shard.name}: .* the manifest says")
        return Case("truncated shard", (refused, mended), (f"data.corpus={corpus}",))

    def corrupted(name: str, allowed: bool) -> Case:
        # What encodes in its steps meets a clip when its turn comes: here, when there is a checkpoint.
        first, *others = bench.trained_in_step(SAVE_EVERY + 2)
        damaged = [first, *(each for each in others if each.shard == first.shard)][:2]
        corpus, shard = bench.damaged_corpus(name.replace(" ", "-").replace(",", ""), first.shard)
        content = shard.read_bytes()
        spoiled = bytearray(content)
        for utterance in damaged:
            for offset, size in utterance.members.values():
                spoiled[offset + size // 2] ^= 1
        _write(shard, bytes(spoiled))
        ids = tuple(utterance.id for utterance in damaged)
        told_of = f"{len(ids)} utterances of split '{bench.config().data.train_split}'"
        if not allowed:
            said = rf"({'|'.join(ids)})\.\w+: its bytes have changed"
            if bench.config().data.features != "online":
                said = rf"{told_of} are damaged: .*{min(ids)}"
            refused = Start(codes=(USER_ERROR,), says=said)
            mended = Start(before=lambda _: _write(shard, content))
            # Features that are encoded in other batches round otherwise, far below the tolerance.
            overrides = (f"data.corpus={corpus}",)
            return Case(name, (refused, mended), overrides, tolerance=TOLERANCE, cache=f"cache-{name}")
        permitted = (f"data.corpus={corpus}", f"data.max_damaged_utterances={len(ids)}")
        left_out = told_of.replace("utterances", "damaged utterances")
        told = Start((Injection("SIGTERM", 1, 2),), (PREEMPTED,), f"{left_out} are left out")
        return Case(name, (told, Start()), permitted, own_reference=True, cache=f"cache-{name}", left_out=ids)

    def full_disk() -> Case:
        full = Injection(FILE_LIMIT, 0, 3, SAVING)
        said = "checkpoint of step 4 could not be written"
        return Case("full disk during a save", (Start((full,), (USER_ERROR,), said), Start()))

    def damaged_checkpoint() -> Case:
        told = Start((Injection("SIGTERM", 0, 3),), (PREEMPTED,), "saved after step 4")
        return Case(
            "damaged newest checkpoint",
            (told, Start(before=_damage_checkpoint, says="step-000004 is damaged and passed over")),
        )

    def torn() -> Case:
        killed = Start((Injection("SIGKILL", 0, 4),), lost)
        return Case("torn last line of the metrics", (killed, Start(before=_tear)))

    def killed_while_saving() -> Case:
        drawn = random.Random(seed)
        starts = []
        for _ in range(kills):
            delay = drawn.uniform(0.001, LATEST_KILL_SECONDS)
            kill = Injection("SIGKILL", drawn.randrange(bench.processes), None, SAVING, delay)
            starts.append(Start((kill,), (*lost, 0)))
        overrides = (f"training.steps={kills + 2}", "training.save_every=1")
        return Case(f"kill -9 during a save, {kills} times", (*starts, Start()), overrides, own_reference=True)

    return {
        "sigterm": lambda: stopped("SIGTERM", "SIGTERM"),
        "sigusr1": lambda: stopped("SIGUSR1", "SIGUSR1"),
        "non-finite": skipped,
        "non-finite-limit": over_the_limit,
        "kill": killed,
        "kill-two": two_killed,
        "hang": hanging,
        "half": halved,
        "truncated-shard": truncated,
        "corrupted-shard": lambda: corrupted("corrupted shard, refused", False),
        "corrupted-shard-left-out": lambda: corrupted("corrupted shard, left out", True),
        "full-disk": full_disk,
        "damaged-checkpoint": damaged_checkpoint,
        "torn-metrics": torn,
        "kill-while-saving": killed_while_saving,
    }


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _damage_checkpoint(run: Path) -> None:
    newest = newest_checkpoint(run)
    assert newest is not None
    part = next(newest.glob("part-*.safetensors"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)


def _tear(run: Path) -> None:
    """Leave half a line, as a kill in the middle of a write does."""
    for path in (run / "metrics.jsonl", run / "routing.jsonl"):
        if path.exists():  # without experts nothing is routed
            with path.open("a") as file:
                file.write('{"step": 5, "lo')
