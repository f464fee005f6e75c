"""`argosy submit` and `argosy jobs`: leave a file of requests with a server, look after it, fetch its results."""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from argosy.cluster.protocol.errors import ConfigError

if TYPE_CHECKING:
    from argosy.deploy.client import Client
    from argosy.deploy.jobs_client import Job

_HERE: Final = "http://127.0.0.1:8000"
SUBMIT_EXAMPLES: Final = """\
a line of FILE is a text in quotes, a list of messages, the body of a request, or one of OpenAI's batch lines; texts to
continue and chats are jobs of their own:
  "Return a list of"                                                           a text to continue
  {"prompt": "Return a list of", "max_tokens": 32, "custom_id": "first"}       the same with wishes
  [{"role": "user", "content": "What does len return?"}]                       a chat, in another file

examples (a server must be running, see 'argosy serve'):
  argosy submit questions.jsonl                     prints the job's id and leaves the rest to the server
  argosy submit questions.jsonl --output out.jsonl  shows a bar until all is done; run again after a kill, it goes on
"""
JOBS_EXAMPLES: Final = """\
examples:
  argosy jobs                                       the newest jobs
  argosy jobs wait batch_0123 --output out.jsonl    a bar until it has ended, then all result lines
  argosy jobs results batch_0123                    result lines as they come
  argosy jobs cancel batch_0123                     what is done stays; 'resume' runs the rest after all
"""
_LOOK_SECONDS: Final = 2.0
_ACTIONS: Final = ("list", "show", "wait", "results", "cancel", "resume")


def add_submit(submit: argparse.ArgumentParser) -> None:
    """The flags of `argosy submit`."""
    submit.add_argument("file", metavar="FILE", help="a request a line, as JSON")
    _add_server(submit)
    submit.add_argument("--wait", action="store_true", help="show a bar until the job has ended")
    submit.add_argument("--output", metavar="FILE", help="wait, then write all result lines there")
    submit.add_argument("--endpoint", help="where the requests go (default: what their first line is for)")
    submit.add_argument("--window", default="24h", help="how long the server may take (default: %(default)s)")
    submit.add_argument("--key", help="a name for this job: submitted again, it is the same job (default: the file's)")
    submit.add_argument("--again", action="store_true", help="a new job, though this file was submitted before")
    submit.add_argument("--model", help="for lines that name none (default: the server's first)")
    submit.add_argument("--max-tokens", type=int, help="for lines that say nothing else")
    submit.add_argument("--temperature", type=float, help="for lines that say nothing else")
    submit.add_argument("--seed", type=int, help="for lines that say nothing else")


def add_jobs(jobs: argparse.ArgumentParser) -> None:
    """The flags of `argosy jobs`."""
    jobs.add_argument("action", nargs="?", default="list", choices=_ACTIONS, help="default: list")
    jobs.add_argument("job", nargs="?", metavar="JOB", help="the job's id, as 'list' shows it")
    _add_server(jobs)
    jobs.add_argument("--output", metavar="FILE", help="with wait and results: write all result lines there at the end")
    jobs.add_argument("--limit", type=int, default=20, help="with list: how many (default: %(default)s)")


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=_HERE, help="the server (default: %(default)s)")
    parser.add_argument("--api-key", default=os.environ.get("ARGOSY_API_KEY"), help="default: $ARGOSY_API_KEY")


def main(args: argparse.Namespace) -> int:
    """Run one of the two commands; the exit code."""
    from argosy.deploy.client import Client  # httpx: `argosy --help` does without

    if args.command == "submit":
        with Client(args.url, api_key=args.api_key) as client:
            return _submit(client, args)
    # who only looks waits for no server; who sees a job through waits for one that comes back
    with Client(args.url, api_key=args.api_key, retry_seconds=_LOOK_SECONDS) as client:
        return _jobs(client, args)


def _submit(client: "Client", args: argparse.Namespace) -> int:
    from argosy.deploy.jobs_client import key_of

    names = ("model", "max_tokens", "temperature", "seed")
    params = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    path = Path(args.file)
    if not path.is_file():
        raise ConfigError(f"{args.file}: no such file; name one with a JSON request a line")
    key = args.key or (None if args.again else key_of(path, args.endpoint, args.window, sorted(params.items())))
    job = client.submit(path, endpoint=args.endpoint, key=key, completion_window=args.window, **params)
    age = time.time() - job.raw["created_at"]
    if age > 2:
        hint = "" if args.key else "; --again makes a new one"
        print(f"argosy: found the job of {age:.0f} s ago for this file{hint}", file=sys.stderr)
    print(job.id, flush=True)
    if args.wait or args.output:
        return _see_through(job, args.output)
    where = "" if args.url == _HERE else f" --url {args.url}"
    print(f"argosy: 'argosy jobs wait {job.id}{where}' shows how far it is", file=sys.stderr)
    return 0


def _jobs(client: "Client", args: argparse.Namespace) -> int:
    from argosy.deploy.client import JOB_OUTAGE_SECONDS

    if args.action == "list":
        _print_table(client.jobs(limit=args.limit))
        return 0
    if not args.job:
        raise ConfigError(f"argosy jobs {args.action}: which job? 'argosy jobs list' shows them")
    looks = args.action not in ("wait", "results")
    job = client.job(args.job, outage_seconds=_LOOK_SECONDS if looks else JOB_OUTAGE_SECONDS)
    match args.action:
        case "show":
            print(json.dumps(job.raw, indent=2))
        case "cancel":
            print(job.cancel().status)
        case "resume":
            print(job.resume().status)
        case "wait":
            return _see_through(job, args.output)
        case _:
            return _results(job, args.output)
    return 0


def _see_through(job: "Job", output: str | None) -> int:
    """Until it has ended; 0 when every item was done."""
    job.wait(progress=True)
    for error in job.errors:
        print(f"argosy: {error['message']}", file=sys.stderr)
    if output and job.status != "failed":
        print(f"argosy: {job.download(output)} results in {output}", file=sys.stderr)
    counts = job.counts
    print(f"argosy: {job.status}: {counts['completed']} done, {counts['failed']} failed", file=sys.stderr)
    return 0 if job.status == "completed" and not counts["failed"] else 1


def _results(job: "Job", output: str | None) -> int:
    if output:
        return _see_through(job, output)
    for result in job.results():
        print(json.dumps(result.raw, ensure_ascii=False), flush=True)
    return 0


def _print_table(jobs: "list[Job]") -> None:
    if not jobs:
        print("no jobs; 'argosy submit FILE' makes one")
        return
    rows = [("job", "status", "done", "made", "endpoint")]
    for job in jobs:
        counts = job.counts
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.raw["created_at"]))
        failed = f", {counts['failed']} failed" if counts["failed"] else ""
        done = f"{counts['completed']}/{counts['total']}{failed}"
        rows.append((job.id, f"{_bar(counts)} {job.status}", done, made, job.raw["endpoint"]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _bar(counts: Mapping[str, int], cells: int = 10) -> str:
    ended = cells * (counts["completed"] + counts["failed"]) // counts["total"] if counts["total"] else 0
    return f"[{'#' * ended}{'.' * (cells - ended)}]"
