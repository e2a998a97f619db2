"""A channel layer for Django Channels on PostgreSQL alone."""
