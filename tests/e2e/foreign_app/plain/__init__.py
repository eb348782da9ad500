"""A line through everybody's points."""
