"""Train a model: `python train.py …` is `swamla train …`."""

import sys

from swamla.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
