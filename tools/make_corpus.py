"""As `mome_dist.commands.synthetic`."""

import sys

from mome_dist.commands.synthetic import main

if __name__ == "__main__":
    sys.exit(main())
