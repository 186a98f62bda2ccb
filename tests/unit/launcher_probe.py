"""What the launcher's tests run as a rank: ``python -m tests.unit.launcher_probe ACTION...``; no test itself.

Actions are ``rank:verb[=value]`` (``*`` for every rank), done in turn.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from mome_dist.cli import main_guard
from mome_dist.errors import UserError


def note_signal(target: Path, number: int) -> None:
    """Write the signal's number and end well."""
    target.write_text(str(number), encoding="utf-8")
    sys.exit(0)


def act(verb: str, value: str) -> None:
    """Do one action."""
    if verb == "exit":
        sys.exit(int(value))
    elif verb == "exit-once":
        marker, _, code = value.rpartition(":")
        if not Path(marker).exists():
            Path(marker).write_text(f"{os.environ['MASTER_PORT']} ", encoding="utf-8")
            sys.exit(int(code))
    elif verb == "kill-self":
        os.kill(os.getpid(), int(value))
    elif verb == "sleep":
        time.sleep(float(value))
    elif verb == "say":
        print(value)
    elif verb == "user-error":
        raise UserError(value)
    elif verb == "ignore-sigterm":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif verb == "write-environment":
        Path(value, f"{os.environ['RANK']}.json").write_text(json.dumps(dict(os.environ)), encoding="utf-8")
    elif verb == "write-pid":
        Path(value, f"{os.environ['RANK']}.pid").write_text(str(os.getpid()), encoding="utf-8")
    elif verb == "start-child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        Path(value, f"{os.environ['RANK']}.child").write_text(str(child.pid), encoding="utf-8")
    elif verb == "note-usr1":
        target = Path(value, f"{os.environ['RANK']}.signal")

        def handler(number: int, _: FrameType | None) -> None:
            note_signal(target, number)

        signal.signal(signal.SIGUSR1, handler)
        Path(value, f"{os.environ['RANK']}.ready").touch()
    else:
        raise AssertionError(verb)


@main_guard
def main() -> None:
    """Do the actions of this rank."""
    for argument in sys.argv[1:]:
        ranks, _, action = argument.partition(":")
        verb, _, value = action.partition("=")
        if ranks in ("*", os.environ["RANK"]):
            act(verb, value)


if __name__ == "__main__":
    sys.exit(main())
