"""The command line ``python -m benchmarks``."""

if __name__ == "__main__":
    try:
        from benchmarks.cli import main

        code = main()
    except KeyboardInterrupt:  # interrupted during the imports
        code = 130
    raise SystemExit(code)
