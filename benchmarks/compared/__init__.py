"""The measurements of ``python -m benchmarks.compare``, with the pg_layer that is imported."""
