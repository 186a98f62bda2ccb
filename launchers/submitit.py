"""As `mome_dist.launchers.submitit`."""

import sys

from mome_dist.launchers.submitit.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
