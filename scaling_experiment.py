"""The guide's test-time scaling command: `python scaling_experiment.py t2i …` is `scale-rae scale t2i …`."""

import sys

from scale_rae.cli import main

if __name__ == "__main__":
    sys.exit(main(["scale", *sys.argv[1:]]))
