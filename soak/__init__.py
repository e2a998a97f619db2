"""Run many processes on a PostgreSQL server, inject random faults and account for every message.

``python -m soak --seconds 120`` starts a run.

Modules without I/O: `records` defines what the processes record. `history` puts the records
together. `ledger` finds lost, duplicated and reordered messages. It uses `absences`, the times at
which a process was disconnected or stopped, and `group_order`.

Modules that perform the run: `cluster` has the servers. `process`, `roles` and `clerk` are the
processes, which `crew` starts and ends. `faults` injects the faults, `run` directs the run and
`report` formats the result.
"""
