"""``python -m mome_dist COMMAND ...`` is ``mome-dist COMMAND ...``."""

import sys

from mome_dist.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
