"""Receiving: notifications in, messages out. Bound to the owner loop."""
