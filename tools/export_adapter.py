"""As `mome_dist.commands.export`."""

import sys

from mome_dist.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
