"""`python -m scale_rae` is `scale-rae`."""

import sys

from scale_rae.cli import main

if __name__ == "__main__":
    sys.exit(main())
