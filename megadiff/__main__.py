"""`python -m megadiff`: the command line, for torchrun (`torchrun -m megadiff train …`)."""

from megadiff.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
