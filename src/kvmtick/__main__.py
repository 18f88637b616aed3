"""`python -m kvmtick` is `kvmtick`."""

import sys

from kvmtick.cli import main

if __name__ == "__main__":
    sys.exit(main())
