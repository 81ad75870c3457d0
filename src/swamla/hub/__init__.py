"""Runs on the Hugging Face Hub: pushed while they train, taken up again from there.

A repository is a run's folder with the best and the newest checkpoint, a model card, and at its root the weights that
`swamla.load` would give. So every command works on what `hf download USER/NAME --local-dir RUN` brings.
"""

from swamla.hub.pull import Pulled, pull
from swamla.hub.push import Pushes, require_hub

__all__ = ["Pulled", "Pushes", "pull", "require_hub"]
