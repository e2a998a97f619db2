"""What is sent: rows, addresses, announcements and payloads. No I/O, no database code."""
