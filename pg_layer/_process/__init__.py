"""The parts that belong to the process: tasks, threads, and its end."""
