"""`python -m blockflow` is the `blockflow` program."""

from blockflow.cli import main

if __name__ == "__main__":
    main()
