"""Draw a report of what was measured."""
