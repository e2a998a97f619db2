"""A chat in two server processes that speak to each other through PostgreSQL alone."""
