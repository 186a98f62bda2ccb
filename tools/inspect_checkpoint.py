"""As `mome_dist.commands.inspect`."""

import sys

from mome_dist.commands.inspect import main

if __name__ == "__main__":
    sys.exit(main())
