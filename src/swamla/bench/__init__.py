"""How fast it is here: timings side by side, what the machine can do at most, peak memory, results that keep."""
