"""A rank that writes down what its ledger was when the cache was measured, and when it was ready.

Used by `measure_memory.py`: one JSON line a rank is appended to the file that ARGOSY_MEMORY names.
"""

import json
import os
from typing import Any

from argosy.cluster.protocol.messages import AllocateCache, StartWorker
from argosy.workers import worker, worker_main


class MeasuredWorker(worker.Worker):
    """Keeps its ledger as it was between measuring and allocating."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._row: dict[str, Any] = {}

    def _start(self, message: StartWorker) -> None:
        super()._start(message)
        ledger, runner = self.ledger, self.runner
        assert runner is not None
        self._row = {
            "rank": self.rank.global_rank, "tp": self.rank.tp_size, "pp": self.rank.pp_size,
            "layers": [self.rank.first_layer, self.rank.last_layer], "block_bytes": runner.block_bytes,
            "peaks": list(ledger.peaks), "activation_bytes": ledger.activation_bytes,
            "graph_bytes": ledger.graph_bytes, "room_bytes": ledger.room_bytes, "measured": ledger.entries(),
        }  # fmt: skip

    def _allocate(self, message: AllocateCache) -> None:
        super()._allocate(message)
        self._row |= {"blocks": message.num_blocks, "ready": self.ledger.entries()}
        line = json.dumps(self._row) + "\n"
        with open(os.environ["ARGOSY_MEMORY"], "a", encoding="utf-8") as file:
            file.write(line)  # one write: ranks share the file


if __name__ == "__main__":
    worker.Worker = MeasuredWorker  # type: ignore[misc]  # the benchmark's own rank
    raise SystemExit(worker_main.main())
