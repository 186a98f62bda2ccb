"""As `mome_dist.commands.plan`."""

import sys

from mome_dist.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
