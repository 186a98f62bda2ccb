"""As `mome_dist.commands.convert_avhubert`."""

import sys

from mome_dist.commands.convert_avhubert import main

if __name__ == "__main__":
    sys.exit(main())
