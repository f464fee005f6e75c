"""A rank as a plain process: `python -m argosy.workers.worker_main`, with a `WorkerBoot` as JSON on its input.

The secret comes over the pipe and not as an argument, since arguments are for everybody to read.
"""

import sys

import msgspec

import argosy.workers.openmp  # noqa: F401  # before torch: it sets what OpenMP reads when it is loaded
from argosy.workers.worker import WorkerBoot, run_worker


def run_boot(boot: bytes) -> int:
    """Be the rank that this JSON says until the driver goes away. Also what the Ray actor calls."""
    return run_worker(msgspec.json.decode(boot, type=WorkerBoot))


def main() -> int:
    """The plain process: the boot is its input."""
    return run_boot(sys.stdin.buffer.read())


if __name__ == "__main__":
    sys.exit(main())
