"""A Django project that uses the layer, for tests in other processes or in the test's process.

`commands` starts its commands. `configured` applies its settings in the test's process.
"""
