"""As `mome_dist.commands.tune`."""

import sys

from mome_dist.commands.tune import main

if __name__ == "__main__":
    sys.exit(main())
