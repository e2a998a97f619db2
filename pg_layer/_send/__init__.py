"""Sending: operations to statements, in batches."""
