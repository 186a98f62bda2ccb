"""As `mome_dist.launchers.local`."""

import sys

from mome_dist.launchers.local import main

if __name__ == "__main__":
    sys.exit(main())
