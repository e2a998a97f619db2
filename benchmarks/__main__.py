"""``python -m benchmarks``."""

if __name__ == "__main__":
    try:
        from benchmarks.cli import main

        code = main()
    except KeyboardInterrupt:  # while it was still loading
        code = 130
    raise SystemExit(code)
