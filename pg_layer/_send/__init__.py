"""Sending: operations, their batches and the statements that write them."""
