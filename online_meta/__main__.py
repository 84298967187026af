"""``python -m online_meta``: the command line."""

from deploy.cli import main

if __name__ == "__main__":
    main()
