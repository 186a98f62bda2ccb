"""As `mome_dist.commands.reshard`."""

import sys

from mome_dist.commands.reshard import main

if __name__ == "__main__":
    sys.exit(main())
