"""pg_layer beside channels_redis, in one run, taking turns: ``python -m benchmarks --help``."""
