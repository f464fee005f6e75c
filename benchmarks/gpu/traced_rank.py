"""A rank that writes down, for each step, what its host did: waiting for the driver, carrying out, and rows and tokens.

Used by `bench_gpu.py --trace FILE`. Lines of JSON: [kind, rows, tokens, wait_us, execute_us].
"""

import json
import os
import time
from typing import Any

from argosy.cluster.protocol.messages import SchedulerOutput
from argosy.workers import worker, worker_main

FLUSH_EVERY = 64  # steps; a rank may be ended without notice


class TracedWorker(worker.Worker):
    """Notes times around the two calls of the loop."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._ended = time.perf_counter()
        self._file = open(os.environ["ARGOSY_TRACE"], "w", encoding="utf-8")  # noqa: SIM115  # open as long as the rank
        self._count = 0

    def _step(self, output: SchedulerOutput) -> None:
        began = time.perf_counter()
        waited = began - self._ended
        super()._step(output)
        self._ended = time.perf_counter()
        kind = "decode" if not output.num_tokens and not output.new_requests else "mixed"
        step = (
            kind,
            len(output.rows),
            output.num_scheduled_tokens,
            int(1e6 * waited),
            int(1e6 * (self._ended - began)),
        )
        self._file.write(json.dumps(step) + "\n")
        self._count += 1
        if self._count % FLUSH_EVERY == 0:
            self._file.flush()


if __name__ == "__main__":
    worker.Worker = TracedWorker  # type: ignore[misc]  # the benchmark's own rank
    raise SystemExit(worker_main.main())
