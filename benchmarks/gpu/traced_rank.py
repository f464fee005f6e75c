"""A rank that writes down each step: what it computed, what its host did, and when its tokens were on the host.

Used by `bench_gpu.py` and `swap/bench_swap.py` with --trace FILE. The rank that answers writes FILE, others FILE.RANK.
Lines of JSON: {"step", "rows", "decodes", "context", "longest", "prefill", "pairs", "sampled"} as the cost model's
`StepLoad` has them, "wait" and "host": microseconds until the driver's word came and until the card had been told
everything, "at": seconds of the word; where blocks are copied "out", "in", "await": how many, and the step whose order
it waits for; and of a rank that answers {"answer": step, "at": seconds}, on the same clock, beside them.
"""

import json
import os
import time
from typing import Any

from argosy.cluster.protocol.messages import ModelRunnerOutput, SchedulerOutput
from argosy.workers import worker, worker_main

FLUSH_EVERY = 64  # lines; a rank may be ended without notice


class TracedWorker(worker.Worker):
    """Notes times around the two calls of the loop, and at each answer."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        path = os.environ["ARGOSY_TRACE"] + ("" if self.rank.answers else f".{self.rank.global_rank}")
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115  # open as long as the rank
        self._count, self._computed = 0, dict[int, int]()  # tokens in the cache, by handle
        self._ended = time.perf_counter()
        send = self.channel.send

        def noted(message: Any) -> None:
            at = time.perf_counter()
            send(message)
            if isinstance(message, ModelRunnerOutput):
                self._note({"answer": message.step_id, "at": round(at, 6)})

        self.channel.send = noted  # type: ignore[method-assign]  # also what the thread that answers calls

    def _step(self, output: SchedulerOutput) -> None:
        began = time.perf_counter()
        load = self._load_of(output)
        waited, began = began - self._ended, time.perf_counter()
        super()._step(output)
        self._ended = time.perf_counter()
        times = {"wait": int(1e6 * waited), "host": int(1e6 * (self._ended - began)), "at": round(began, 6)}
        self._note({"step": output.step_id, **load, **times})

    def _load_of(self, output: SchedulerOutput) -> dict[str, int]:
        """What the step computes; advances what is known of its rows."""
        computed = self._computed
        for handle in output.finished:
            computed.pop(handle, None)
        for request in output.new_requests:
            computed[request.handle] = request.num_computed_tokens
        decodes = context = longest = prefill = pairs = 0
        for place, handle in enumerate(output.rows):
            count, before = (output.num_tokens[place] if output.num_tokens else 1), computed[handle]
            computed[handle] = before + count
            if count == 1:
                decodes, context, longest = decodes + 1, context + before + 1, max(longest, before + 1)
            else:
                prefill, pairs = prefill + count, pairs + count * before + count * (count + 1) // 2
        sampled, swaps = len(output.rows) - len(output.partial), output.swaps
        moved = {"out": len(swaps.out), "in": len(swaps.into), "await": swaps.await_step_id} if swaps else {}
        return {"rows": len(output.rows), "decodes": decodes, "context": context, "longest": longest,
                "prefill": prefill, "pairs": pairs, "sampled": sampled, **moved}  # fmt: skip

    def _note(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")  # one call: two threads write
        self._count += 1
        if self._count % FLUSH_EVERY == 0:
            self._file.flush()


if __name__ == "__main__":
    worker.Worker = TracedWorker  # type: ignore[misc]  # the benchmark's own rank
    raise SystemExit(worker_main.main())
