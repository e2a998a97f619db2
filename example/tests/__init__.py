"""The tests of the demo, as a project that uses the layer would write them.

`python -m example.manage test example` runs the test cases, `pytest example` runs all tests, with
DJANGO_SETTINGS_MODULE set to `example.settings`. Both need PG_LAYER_DSN, and create a test database
on the same server.
"""
