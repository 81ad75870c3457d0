"""Runs on the Hugging Face Hub: pushed while they train, resumed from there.

A repository is a run's folder with the best and the newest checkpoint, a model card, and at its root the weights that
`swamla.load` would give. So every command works on the folder that `hf download USER/NAME --local-dir RUN` writes.
"""
