"""Memberships of the client: changes, and the rows of the table. Bound to the owner loop."""
