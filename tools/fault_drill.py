"""As `mome_dist.commands.drill`."""

import sys

from mome_dist.commands.drill import main

if __name__ == "__main__":
    sys.exit(main())
