"""The database: connections, statements and their errors."""
