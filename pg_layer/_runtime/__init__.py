"""What runs: event loops, leases, the end of the process."""
