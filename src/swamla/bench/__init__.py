"""Benchmarks: alternating timings, the machine's peak rates, peak memory, and stored results."""
