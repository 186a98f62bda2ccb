"""As `mome_dist.launchers.slurm`."""

import sys

from mome_dist.launchers.slurm.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
