"""What a run reports: metrics, console and trackers."""
