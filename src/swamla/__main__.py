"""`swamla …` and `python -m swamla …`."""

import sys

from swamla.cli import main

if __name__ == "__main__":
    sys.exit(main())
