"""The sweeper, and the status in words."""
