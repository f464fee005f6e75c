#!/usr/bin/env bash
# The layouts of four cards under one workload, one after the other: bash benchmarks/planner/measure_layouts.sh OUT.jsonl
# Several replicas run side by side, each on its own cards with its own copy of the workload: their figures add up.
set -u
logs=$(mktemp -d)
out=${1:?where to append the JSON lines}
model=${2:-8b}
workload=${3:-fixed512x256}
measure() { # name, cards of each replica separated by /, tp, pp
    local number=0
    for cards in ${2//\// }; do
        CUDA_VISIBLE_DEVICES=$cards timeout 100 python3 benchmarks/gpu/bench_gpu.py --model "$model" -tp "$3" -pp "$4" \
            --workload "$workload" --repeats 1 --note "replica $number of $1" --output "$out" >"$logs/layout-$1-$number.log" 2>&1 &
        number=$((number + 1))
    done
    wait
    tail -n 2 "$logs"/layout-"$1"-*.log
}
measure 4xTP1 0/1/2/3 1 1
measure 1xTP2xPP2 0,1,2,3 2 2
measure 1xTP4 0,1,2,3 4 1
measure 2xTP2 0,1/2,3 2 1
measure 2xPP2 0,1/2,3 1 2
measure 1xPP4 0,1,2,3 1 4
