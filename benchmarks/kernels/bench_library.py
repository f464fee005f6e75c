"""Is the algorithm that the library chooses for a product its best one? `python benchmarks/kernels/bench_library.py`.

Asks cuBLASLt for its candidates (by its own heuristic, with the workspace torch gives it), times each of them while the
card is kept busy, on inputs that differ from row to row, and prints for each product what torch takes, the heuristic's
first choice and the best: JSON lines. Times are microseconds a product over `--seconds` in which weights rotate so that
none is found in the cache; the clock is what the card's power allows meanwhile.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Row = dict[str, Any]
PRODUCTS = {
    "8b": {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)},
    "06b": {"qkv": (1024, 4096), "o": (2048, 1024), "gate_up": (1024, 6144), "down": (3072, 1024)},
}
COMPUTE_32F, R_32F, R_16BF = 68, 0, 14
TRANSA, MAX_WORKSPACE = 3, 1
WORKSPACE = 32 << 20
L2_BYTES = 60 << 20


class Heuristic(ctypes.Structure):
    """One candidate."""

    _fields_ = [
        ("algo", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


class Library:
    """The few calls of cuBLASLt that a row-major y = x W^T needs."""

    def __init__(self) -> None:
        self.lt = ctypes.CDLL(next(name for name in _loaded() if "libcublasLt.so" in name))
        self.handle = ctypes.c_void_p()
        self._ok(self.lt.cublasLtCreate(ctypes.byref(self.handle)))
        self.workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")
        self.one, self.zero = ctypes.c_float(1.0), ctypes.c_float(0.0)

    @staticmethod
    def _ok(status: int) -> None:
        if status:
            raise RuntimeError(f"cuBLASLt: status {status}")

    def candidates(
        self, tokens: int, num_in: int, num_out: int, most: int
    ) -> tuple[list[Heuristic], Callable[..., None]]:
        """What the heuristic offers, best first by its own opinion, and how one is run: (algo, x, w, y, beta)."""
        desc, pref = ctypes.c_void_p(), ctypes.c_void_p()
        self._ok(self.lt.cublasLtMatmulDescCreate(ctypes.byref(desc), COMPUTE_32F, R_32F))
        transposed = ctypes.c_int(1)
        self._ok(self.lt.cublasLtMatmulDescSetAttribute(desc, TRANSA, ctypes.byref(transposed), ctypes.c_size_t(4)))
        layouts = [self._layout(num_in, num_out), self._layout(num_in, tokens), self._layout(num_out, tokens)]
        self._ok(self.lt.cublasLtMatmulPreferenceCreate(ctypes.byref(pref)))
        room = ctypes.c_size_t(WORKSPACE)
        self._ok(
            self.lt.cublasLtMatmulPreferenceSetAttribute(pref, MAX_WORKSPACE, ctypes.byref(room), ctypes.c_size_t(8))
        )
        found, count = (Heuristic * most)(), ctypes.c_int(0)
        self._ok(
            self.lt.cublasLtMatmulAlgoGetHeuristic(
                self.handle, desc, *layouts, layouts[2], pref, most, found, ctypes.byref(count)
            )
        )

        def run(algo: Heuristic, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, beta: bool = False) -> None:
            self._ok(
                self.lt.cublasLtMatmul(
                    self.handle, desc, ctypes.byref(self.one), ctypes.c_void_p(w.data_ptr()), layouts[0],
                    ctypes.c_void_p(x.data_ptr()), layouts[1], ctypes.byref(self.one if beta else self.zero),
                    ctypes.c_void_p(y.data_ptr()), layouts[2], ctypes.c_void_p(y.data_ptr()), layouts[2],
                    ctypes.byref(algo.algo), ctypes.c_void_p(self.workspace.data_ptr()), ctypes.c_size_t(WORKSPACE),
                    ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
                )
            )  # fmt: skip

        return [one for one in found[: count.value] if one.state == 0], run

    def _layout(self, rows: int, columns: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        self._ok(
            self.lt.cublasLtMatrixLayoutCreate(
                ctypes.byref(layout), R_16BF, ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows)
            )
        )
        return layout


def _loaded() -> list[str]:
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return sorted({line.split()[-1] for line in maps if ".so" in line})


def kept_busy(calls: Sequence[Callable[[], object]], seconds: float, flops: float) -> tuple[float, float]:
    """Microseconds a call in a short burst and in the last half of so many seconds, from replays of one graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    count = max(len(calls), min(128, round(3e-3 * 600e12 / flops)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replayed(times: int) -> float:
        start.record()
        for _ in range(times):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3 / times / count

    burst = replayed(2)
    times = max(2, round(seconds * 0.5e6 / (burst * count)))
    replayed(times)
    return burst, replayed(times)


def card() -> str:
    """Clock and power now."""
    asked = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip().replace("\n", "; ")


def measure(library: Library, tokens: int, num_in: int, num_out: int, *, most: int, seconds: float) -> Row:
    """What torch takes, what it takes to add, the heuristic's first choice, the best few."""
    copies = max(2, min(8, 4 * L2_BYTES // (2 * num_in * num_out)))
    x = torch.randn(tokens, num_in, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(num_out, num_in, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(copies)]
    y = torch.empty(tokens, num_out, device="cuda", dtype=torch.bfloat16)
    flops = 2.0 * tokens * num_in * num_out
    burst, kept = kept_busy([lambda w=w: torch.mm(x, w.t(), out=y) for w in weights], seconds, flops)
    wanted = y.clone()
    row: Row = {"torch": [round(burst, 1), round(kept, 1)]}
    adding = kept_busy([lambda w=w: y.addmm_(x, w.t(), beta=0.5) for w in weights], seconds, flops)
    row["torch_adds"] = [round(us, 1) for us in adding]
    found, run = library.candidates(tokens, num_in, num_out, most)
    times = []
    for index, algo in enumerate(found):
        try:
            calls = [lambda w=w, algo=algo: run(algo, x, w, y) for w in weights]
            burst, kept = kept_busy(calls, seconds, flops)
            times.append((kept, burst, index))
        except RuntimeError as error:
            print(f"candidate {index}: {error}", flush=True)
    row["first_choice"] = [round(times[0][1], 1), round(times[0][0], 1)] if times else None
    times.sort()
    row["best"] = [
        {"index": index, "us": [round(burst, 1), round(kept, 1)], "waves": round(found[index].waves, 2),
         "config": [hex(word) for word in found[index].algo[:4]]}
        for kept, burst, index in times[:4]
    ]  # fmt: skip
    row["tflops_kept"] = round(flops / times[0][0] / 1e6) if times else None
    row["error"] = round(float((y.float() - wanted.float()).norm() / wanted.float().norm()), 5)
    return {**row, "candidates": len(found), "card": card()}


def main() -> int:
    """Print a line for each product and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(PRODUCTS), default="8b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 64, 8192])
    parser.add_argument("--products", nargs="+", default=["gate_up", "down", "qkv", "o"])
    parser.add_argument("--most", type=int, default=16, help="candidates asked for")
    parser.add_argument("--seconds", type=float, default=0.2, help="each candidate is kept busy for")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds of the whole; what is left out is said")
    args = parser.parse_args()
    torch.manual_seed(1)
    F.linear(torch.zeros(8, 8, device="cuda"), torch.zeros(8, 8, device="cuda"))
    torch.mm(*torch.zeros(2, 64, 64, device="cuda", dtype=torch.bfloat16))
    library, began = Library(), time.monotonic()
    for tokens in args.tokens:
        for name in args.products:
            if time.monotonic() - began > args.limit:
                print(f"left out for time: {tokens} {name}")
                continue
            num_in, num_out = PRODUCTS[args.model][name]
            row = measure(library, tokens, num_in, num_out, most=args.most, seconds=args.seconds)
            print(json.dumps({"product": name, "tokens": tokens, **row}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
