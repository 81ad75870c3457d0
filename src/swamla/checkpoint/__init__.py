"""Checkpoints: written, verified, chosen, pruned and loaded."""

from swamla.checkpoint.convert import convert_checkpoint
from swamla.checkpoint.folder import (
    FORMAT_VERSION,
    Checkpoint,
    WriterGroup,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    mark_best,
    prune,
    save_checkpoint,
    set_aside_after,
    step_name,
    step_of,
    verify,
    whole_checkpoint,
)
from swamla.checkpoint.pieces import Piece, Pieces, save_pieces
from swamla.checkpoint.run import best_step, find_checkpoint, load, load_into, read_run_config, stored_paths
from swamla.checkpoint.saver import Saved, Saver

__all__ = [
    "FORMAT_VERSION",
    "Checkpoint",
    "Piece",
    "Pieces",
    "Saved",
    "Saver",
    "WriterGroup",
    "best_step",
    "convert_checkpoint",
    "find_checkpoint",
    "latest_checkpoint",
    "list_checkpoints",
    "load",
    "load_checkpoint",
    "load_into",
    "mark_best",
    "prune",
    "read_run_config",
    "save_checkpoint",
    "save_pieces",
    "set_aside_after",
    "step_name",
    "step_of",
    "stored_paths",
    "verify",
    "whole_checkpoint",
]
