"""What a client knows. Pure: no I/O, no database code. Each class says which thread may use it."""
