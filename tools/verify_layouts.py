"""As `mome_dist.commands.verify`."""

import sys

from mome_dist.commands.verify import main

if __name__ == "__main__":
    sys.exit(main())
