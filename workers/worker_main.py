"""A rank as a plain process: `python -m argosy.workers.worker_main`, with a `WorkerBoot` as JSON on its input.

The secret comes over the pipe and not as an argument, since arguments are for everybody to read.
"""

import sys

import msgspec

from argosy.workers.worker import WorkerBoot, run_worker


def main() -> int:
    """Read the boot and be that rank until the driver goes away."""
    return run_worker(msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerBoot))


if __name__ == "__main__":
    sys.exit(main())
