"""`python -m tl1kernels` is the `tl1kernels` command."""

import sys

from tl1kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
