"""Imported before torch: what OpenMP reads from the environment when it is loaded.

libgomp's idle threads spin for milliseconds by default. Beside a driver and an edge on the same cores, or any other
program, they take the core from those who have work: on two shared cores a decode step of 32 rows took 247 ms of CPU
time with two spinning threads, 15 ms with two that sleep at once, 12 ms with one. Spinning for some 40 us costs little
and covers the gap between two products: with it steps gain from a second core where the machine is idle, and
`device.ThreadChoice` finds out whether it is. Who sets either variable has the last word.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
