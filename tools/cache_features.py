"""As `mome_dist.commands.features`."""

import sys

from mome_dist.commands.features import main

if __name__ == "__main__":
    sys.exit(main())
