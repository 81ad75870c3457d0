"""Data-parallel strategies and expert parallelism."""
