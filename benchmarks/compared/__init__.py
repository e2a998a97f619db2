"""The measurements of ``python -m benchmarks.compare``, on whichever pg_layer is imported."""
