"""The demo's own tests, written as any project would that uses the layer.

`python -m example.manage test example` runs the test cases, `pytest example` all of them, with
DJANGO_SETTINGS_MODULE set to `example.settings`. Both need PG_LAYER_DSN, and make a test database beside the
one that it names.
"""
