"""Checkpoints: write, verify, select, prune and load them."""

from typing import TYPE_CHECKING

from swamla.exports import lazy_exports

if TYPE_CHECKING:
    from swamla.checkpoint.convert import convert_checkpoint as convert_checkpoint
    from swamla.checkpoint.folder import FORMAT_VERSION as FORMAT_VERSION
    from swamla.checkpoint.folder import Checkpoint as Checkpoint
    from swamla.checkpoint.folder import WriterGroup as WriterGroup
    from swamla.checkpoint.folder import latest_checkpoint as latest_checkpoint
    from swamla.checkpoint.folder import list_checkpoints as list_checkpoints
    from swamla.checkpoint.folder import load_checkpoint as load_checkpoint
    from swamla.checkpoint.folder import load_into as load_into
    from swamla.checkpoint.folder import mark_best as mark_best
    from swamla.checkpoint.folder import prune as prune
    from swamla.checkpoint.folder import save_checkpoint as save_checkpoint
    from swamla.checkpoint.folder import set_aside_after as set_aside_after
    from swamla.checkpoint.folder import step_name as step_name
    from swamla.checkpoint.folder import step_of as step_of
    from swamla.checkpoint.folder import stored_paths as stored_paths
    from swamla.checkpoint.folder import verify as verify
    from swamla.checkpoint.folder import whole_checkpoint as whole_checkpoint
    from swamla.checkpoint.quantized import dequantized as dequantized
    from swamla.checkpoint.quantized import quantize as quantize
    from swamla.checkpoint.quantized import quantized_bytes as quantized_bytes
    from swamla.checkpoint.quantized import save_quantized as save_quantized
    from swamla.checkpoint.run import best_step as best_step
    from swamla.checkpoint.run import find_checkpoint as find_checkpoint
    from swamla.checkpoint.run import load as load
    from swamla.checkpoint.run import read_run_config as read_run_config
    from swamla.checkpoint.saver import Saved as Saved
    from swamla.checkpoint.saver import Saver as Saver
    from swamla.checkpoint.shards import Shard as Shard
    from swamla.checkpoint.shards import ShardReader as ShardReader
    from swamla.checkpoint.shards import save_shards as save_shards
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
