"""`python -m hymba` is `hymba`."""

from hymba.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
