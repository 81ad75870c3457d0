"""The fault matrix: all rows, in the order in which docs/reliability.md tells them."""

from tests.faults import kills

ROWS = [*kills.ROWS]
