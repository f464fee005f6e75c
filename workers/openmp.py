"""Imported before torch: what OpenMP reads from the environment when it is loaded.

libgomp's idle threads spin for milliseconds by default. Beside a driver and an edge on the same cores, or any other
program, they take the core from those who have work: on two shared cores a decode step of 32 rows took 247 ms of CPU
time with two spinning threads, 15 ms with two that sleep, 12 ms with one. Who sets either variable has the last word.
"""

import os

if "GOMP_SPINCOUNT" not in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
