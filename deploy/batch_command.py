"""`argosy batch`: a file of requests to a file of answers, with an engine that runs for it alone and no server.

It is a job like those of a server, kept in a folder beside the output: killed and started again, it goes on.
"""

import argparse
from pathlib import Path
from typing import Final, Literal

from argosy.cluster.protocol.errors import ConfigError
from argosy.deploy import settings

EXAMPLES: Final = """\
examples:
  argosy batch questions.jsonl --output answers.jsonl                     the model that ships with Argosy
  argosy batch questions.jsonl --output answers.jsonl --model Qwen/Qwen3-0.6B -tp 2
run again after a kill, the same command goes on; what a line may hold: 'argosy submit --help'
"""
_ONE_DAY_SECONDS: Final = 86400.0  # nobody waits at a socket


def add_arguments(batch: argparse.ArgumentParser) -> None:
    """The flags: those of an engine, and the two files."""
    batch.add_argument("file", metavar="FILE", help="a request a line, as JSON")
    batch.add_argument("--output", "-o", required=True, metavar="FILE", help="where the result lines go")
    batch.add_argument("--model", help="folder or hub name (default: the small model that ships with Argosy)")
    batch.add_argument("--endpoint", help="where the requests go (default: what their first line is for)")
    batch.add_argument("--backend", default="ray", choices=("ray", "local"), help="with Ray or as plain processes")
    settings.add_flags(batch, without=("server",))


def main(args: argparse.Namespace) -> int:
    """Run the file; 0 when every item was done."""
    names = {flag.field for flag in settings.SETTING_FLAGS}
    given = {name: value for name, value in vars(args).items() if name in names}
    given |= {"model": settings.choose_model(args.model), "request_deadline_seconds": _ONE_DAY_SECONDS}
    config, _ = settings.make_config(given)
    path, output = Path(args.file), Path(args.output)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; name one with a JSON request a line")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: there is no such folder")
    from argosy.deploy.jobs_offline import run_file  # the engine's libraries, which `argosy --help` does without

    backend: Literal["ray", "local"] = "local" if args.backend == "local" else "ray"
    return run_file(config, path, output, endpoint=args.endpoint, backend=backend)
