"""Entry point of `python -m sbeval`."""

from sbeval.cli.main import main

if __name__ == "__main__":
    main()
