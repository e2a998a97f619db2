"""The sweeper, and the text of the status."""
