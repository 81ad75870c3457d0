"""What a run tells: programs, people, and trackers."""
