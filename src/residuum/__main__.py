"""`python -m residuum` is the command `residuum`."""

from residuum.cli.main import main

if __name__ == "__main__":
    main()
