"""`python -m argosy` is the same program as the `argosy` command."""

from argosy.deploy.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
