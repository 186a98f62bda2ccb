"""As `mome_dist.commands.fetch`."""

import sys

from mome_dist.commands.fetch import main

if __name__ == "__main__":
    sys.exit(main())
