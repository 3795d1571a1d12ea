"""`python -m optimum_fista`: the command line."""

from optimum_fista.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
