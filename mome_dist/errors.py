"""The one exception for mistakes that a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """A wrong config value, file or layout.

    The message is one line that names the key or file, the value found, and the fix. Command lines print it without a
    traceback and exit with code 2 (`mome_dist.cli.main_guard`).
    """
