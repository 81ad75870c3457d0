"""Runs on the Hugging Face Hub: push them during training, resume from them.

A repository is a run's folder with the best and the newest checkpoint, a model card, and at its root the weights that
`swamla.load` returns. So every command works on a folder written by `hf download USER/NAME --local-dir RUN`.
"""
