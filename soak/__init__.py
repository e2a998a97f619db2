"""Many processes, a PostgreSQL server, and faults at random; then a ledger of every message.

``python -m soak --seconds 120``. Pure: `records` are what the processes write down; `ledger`
decides what was lost, doubled or disordered, with `absences` (when a process was away) and
`group_order`. The rest makes it happen: `cluster` are the servers; `process`, `roles` and `clerk`
the processes; `faults` is what is done to them; `run` is the course of events.
"""
