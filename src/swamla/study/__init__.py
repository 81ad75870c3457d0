"""Studies: several arms trained alike, compared with intervals, and a verdict in words (docs/study.md)."""
