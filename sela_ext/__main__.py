"""`python -m sela_ext` is `sela`."""

from sela_ext.cli import main

if __name__ == "__main__":
    main()
