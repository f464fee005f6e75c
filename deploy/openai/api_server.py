"""`python -m argosy.deploy.openai.api_server --model ...`: the module form that scripts written for vLLM use."""

import sys

from argosy.deploy.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["serve", *sys.argv[1:]]))
