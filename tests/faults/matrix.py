"""The fault matrix: all rows, in the order in which docs/reliability.md tells them."""

from tests.faults import disks, kills, networks, others, ranks, signals

ROWS = [*kills.ROWS, *disks.ROWS, *signals.ROWS, *ranks.ROWS, *networks.ROWS, *others.ROWS]
