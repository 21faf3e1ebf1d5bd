"""The command line of the inference guide: `python cli.py t2i --prompt …` is the installed `scale-rae t2i --prompt …`."""

import sys

from scale_rae.cli import main

if __name__ == "__main__":
    sys.exit(main())
