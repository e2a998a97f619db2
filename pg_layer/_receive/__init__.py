"""Receiving: from notifications to channel queues. Bound to the owner loop."""
