"""What is sent: rows, addresses and announcements. Pure: no I/O, no database code."""
