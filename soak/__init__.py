"""Many processes, one PostgreSQL server, and faults at random; then a ledger of every message.

``python -m soak --seconds 120``. `ledger` decides what was lost, doubled or disordered, and is pure; the rest
makes it happen: `roles` are the processes, `faults` is what is done to them, `run` is the course of events.
"""
