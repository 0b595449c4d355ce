"""``python -m maskdm``: the same command line as ``maskdm``."""

from maskdm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
