"""As `mome_dist.commands.average`."""

import sys

from mome_dist.commands.average import main

if __name__ == "__main__":
    sys.exit(main())
