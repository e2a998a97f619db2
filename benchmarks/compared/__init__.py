"""The measurements of ``python -m benchmarks.compare``, with whichever pg_layer is imported."""
