"""As `mome_dist.commands.prepare`."""

import sys

from mome_dist.commands.prepare import main

if __name__ == "__main__":
    sys.exit(main())
