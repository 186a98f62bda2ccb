"""As `mome_dist.commands.check`."""

import sys

from mome_dist.commands.check import main

if __name__ == "__main__":
    sys.exit(main())
