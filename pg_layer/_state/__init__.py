"""What a client knows. No I/O, no database code. Each class says which threads may use it."""
