"""pg_layer compared with other layers in one run: ``python -m benchmarks --help``."""
