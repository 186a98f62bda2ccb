"""What the exit code of a command means. Launchers and schedulers read it, so nothing heavy is imported here.

A launcher may start a run again after `PREEMPTED`, `RANK_LOST` and any crash: it continues from its newest checkpoint.
After `USER_ERROR` the same would happen again, and after `INTERRUPTED` nobody wants it.
"""

from __future__ import annotations

USER_ERROR = 2  # a wrong value, file or layout; one line says which
PREEMPTED = 75  # asked to stop, and saved (EX_TEMPFAIL of sysexits.h: try again)
RANK_LOST = 76  # another rank died, hangs or is too slow; one line says which (EX_PROTOCOL: the peer failed)
TIMED_OUT = 124  # the launcher's own --timeout ran out, as timeout(1) reports it
INTERRUPTED = 130  # Ctrl-C: 128 + SIGINT, as shells report it

FAILED_AT = "MOME_DIST_FAILED_AT"  # environment variable of a restarted run: when it failed, seconds since 1970
