"""`python -m kvmtick`."""

import sys

from kvmtick.cli import main

sys.exit(main())
