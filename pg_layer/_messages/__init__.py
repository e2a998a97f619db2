"""The data that is sent: rows, addresses, announcements, payloads. No I/O, no database."""
