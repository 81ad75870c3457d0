"""Train a model by the flags of the project that swamla replaces; `python train.py --help` lists what each is here."""

import sys

from swamla.cli import main

if __name__ == "__main__":
    sys.exit(main(command="original"))
