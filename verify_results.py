"""The selection of the guide: `python verify_results.py --sample-dir DIR` is the installed `scale-rae select --sample-dir DIR`."""

import sys

from scale_rae.cli import main

if __name__ == "__main__":
    sys.exit(main(["select", *sys.argv[1:]]))
