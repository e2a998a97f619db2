"""The state of a client. No I/O, no database code. Each class documents its threads."""
