"""What belongs to the process: tasks, threads, and its end."""
