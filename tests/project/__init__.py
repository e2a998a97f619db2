"""A Django project as users of the layer have one, for tests: run in its own processes, or in the test's.

`commands` starts its commands, `configured` gives the test's own process its settings.
"""
