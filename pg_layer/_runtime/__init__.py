"""Event loops, the engine of a loop, receiving, the lease, and health."""
