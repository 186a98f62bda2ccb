"""As `mome_dist.commands.convert_family`."""

import sys

from mome_dist.commands.convert_family import main

if __name__ == "__main__":
    sys.exit(main())
