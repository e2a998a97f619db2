"""The tests of the demo. A project that uses the layer may write its tests in this way.

`python -m example.manage test example` runs the test cases, `pytest example` runs all tests, with
DJANGO_SETTINGS_MODULE set to `example.settings`. Both need PG_LAYER_DSN, and create a test database
on the same server.
"""
