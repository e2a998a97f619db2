"""A chat in two server processes that communicate through PostgreSQL only."""
