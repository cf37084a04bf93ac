"""`python -m unplant` is the same as `unplant`."""

from unplant.cli import main

if __name__ == "__main__":
    main()
