"""`python -m sbeval`: the command line."""

from sbeval.cli.main import main

if __name__ == "__main__":
    main()
