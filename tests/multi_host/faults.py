#!/usr/bin/env python3
"""Set-up faults, put one by one into a cluster of two hosts out of namespaces, and what Argosy says to each.

    sudo python tests/multi_host/faults.py [--only CHECK ...] [--output benchmarks/results/setup_faults.jsonl]

Each host has its own copy-on-write view of the packages, the sources and the model, a made-up `nvidia-smi` that shows
one card, and its own network, so that a fault is real to all that look. A fault counts when the line names the odd host
within ten seconds of the command. Prints a table; ends with 1 when a fault was missed.
"""

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hosts import HOME, TEMP, Host, Hosts, kept_folders, missing_here, usual_path

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "argosy" / "default_model"
PACKAGES = Path(sys.prefix) / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
RAY_TEMP = f"{TEMP}/of-ray"  # TMPDIR of Ray there
MOST_SECONDS = 10.0
CARD = "0, GPU-{host}, NVIDIA H100 80GB HBM3, 81559, 4, 580.82, 16, 16, 0, Default, Disabled"
SMI = f"#!/bin/sh\n[ -f {HOME}/smi-fails ] && echo 'Unable to determine the device handle: GPU is lost' && exit 15\n"
SMI += f"cat {HOME}/smi\n"
RAY_PORTS = "--node-manager-port=6800 --object-manager-port=6801 --min-worker-port=10002 --max-worker-port=10999 "
RAY_PORTS += "--dashboard-agent-listen-port=6802 --dashboard-agent-grpc-port=6803 --metrics-export-port=6804 "
RAY_PORTS += "--runtime-env-agent-port=6805"


class Injected(NamedTuple):
    """One fault: what is done to the second host, how it is undone, and how Argosy has to name it."""

    check: str
    what: str
    inject: str = "true"
    undo: str = "true"
    command: str = ""  # empty: the doctor; else what is run on the first host and has to fail
    expect: str = ""  # a word of that command's last line
    restart: str = ""  # environment with which Ray of the second host is started again


def metadata(package: str) -> str:
    """The file that says which version of a package is installed."""
    (folder,) = PACKAGES.glob(f"{package}-*.dist-info")
    return f"{folder}/METADATA"


def version_of(package: str) -> str:
    """Without what names a build."""
    text = Path(metadata(package)).read_text(encoding="utf-8")
    return next(line.split()[1] for line in text.splitlines() if line.startswith("Version: ")).split("+")[0]


def set_version(package: str, version: str) -> str:
    """A shell command."""
    return f"sed -i 's/^Version: .*/Version: {version}/' {shlex.quote(metadata(package))}"


def smi(**cells: str) -> str:
    """A shell command that gives the second host's card other properties."""
    names = ("index", "uuid", "name", "total", "used", "driver", "width", "width_max", "ecc", "mode", "mig")
    row = dict(zip(names, CARD.format(host=1).split(", "), strict=True)) | cells
    return f"echo {shlex.quote(', '.join(row[name] for name in names))} > ~/smi"


def faults(first: Host) -> list[Injected]:
    """All of them. The host's usual state is a card of its own and equal versions."""
    return [
        *of_software(),
        *of_cards(),
        *of_the_node(),
        *of_the_network(),
        *of_the_model(),
        *of_commands(first),
        *of_ray(),
    ]


def of_software() -> list[Injected]:
    """Packages and sources that are missing, or differ from the first host's."""
    torch = version_of("torch")
    nccl = PACKAGES / "nvidia_nccl_cu13-2.27.dist-info"
    tokenizers = Path(metadata("tokenizers")).parent
    return [
        Injected("package-missing", "a package is not installed", f"mv {tokenizers} ~/t", f"mv ~/t {tokenizers}"),
        Injected(
            "package-differs",
            "another version of torch",
            set_version("torch", "2.9.9+cu130"),
            set_version("torch", f"{torch}+cu130"),
        ),
        Injected(
            "package-differs",
            "another version of Ray",
            set_version("ray", "2.59.0"),
            set_version("ray", version_of("ray")),
        ),
        Injected(
            "nccl-differs",
            "NCCL on one node only",
            f"mkdir {nccl}; printf 'Metadata-Version: 2.1\\n"
            f"Name: nvidia-nccl-cu13\\nVersion: 2.27\\n' > {nccl}/METADATA",
            f"rm -r {nccl}",
        ),
        Injected(
            "code-differs",
            "a line of our sources changed",
            f"echo '# x' >> {ROOT}/cluster/clock.py",
            f"sed -i '$d' {ROOT}/cluster/clock.py",
        ),
        Injected(
            "torch-without-cuda",
            "a CPU build of torch beside a GPU",
            set_version("torch", f"{torch}+cpu"),
            set_version("torch", f"{torch}+cu130"),
        ),
    ]


def of_cards() -> list[Injected]:
    """What `nvidia-smi` says of the card, or does not."""
    card = smi()
    return [
        Injected("gpu-driver", "the driver lost its card", "touch ~/smi-fails", "rm ~/smi-fails"),
        Injected("gpu-missing", "Ray was told of a card that is not there", "> ~/smi", card),
        Injected("gpu-occupied", "a rank of an earlier run holds the card", smi(used="70123"), card),
        Injected("gpu-in-use", "something uses part of the card", smi(used="5000"), card),
        Injected("gpu-ecc", "memory errors", smi(ecc="7"), card),
        Injected("gpu-pcie", "a card in the wrong slot", smi(width="4"), card),
        Injected("gpu-prohibited", "a card that takes no programs", smi(mode="Prohibited"), card),
        Injected(
            "gpu-mig",
            "MIG on one of two cards",
            f"{card}; {smi(index='1', uuid='GPU-8', mig='Enabled')[:-7]} >> ~/smi",
            card,
        ),
        Injected("gpu-twice", "two raylets with one card", smi(uuid="GPU-0"), card),
        Injected("gpu-differs", "another model of card", smi(name="NVIDIA A100-SXM4-80GB"), card),
        Injected("driver-differs", "another driver", smi(driver="590.44"), card),
        Injected("driver-old", "a driver too old for torch", smi(driver="535.10"), card),
    ]


def of_the_node() -> list[Injected]:
    """Memory, disks and limits."""
    fill = "size=$(( $(df --output=used -B1 /dev/shm | tail -1) + 16777216 ))"
    raylet, unmount = "$(pgrep -o raylet)", f"umount -l {RAY_TEMP}"
    return [
        Injected(
            "shm-small",
            "16 MiB of shared memory",
            f"mount -o remount,{fill} /dev/shm",
            "mount -o remount,size=2g /dev/shm",
        ),
        Injected("temp-full", "a full disk", f"mount -t tmpfs -o size=64m tmpfs {RAY_TEMP}", unmount),
        Injected("temp-unwritable", "a disk mounted read-only", f"mount -t tmpfs -o ro tmpfs {RAY_TEMP}", unmount),
        Injected(
            "open-files",
            "512 open files",
            f"for p in {raylet} $(pgrep -P {raylet}); do prlimit --pid $p --nofile=512:; done",
            f"for p in {raylet} $(pgrep -P {raylet}); do prlimit --pid $p --nofile=20000:; done",
        ),
    ]


def of_the_network() -> list[Injected]:
    """Names, links, firewalls and clocks."""
    drop = "nft add table inet t; nft 'add chain inet t c { type filter hook input priority 0; }'; "
    drop += "nft add rule inet t c ct state established,related accept; "
    drop += "nft add rule inet t c tcp dport 32768-65535 drop"
    names = "cp /etc/hosts ~/hosts; grep -v $(hostname) ~/hosts > /etc/hosts; "
    names += "printf 'nameserver 203.0.113.1\\noptions timeout:2 attempts:1\\n' > /etc/resolv.conf"
    shifted = "import time\n_now = time.time\ntime.time = lambda: _now() + 90.0\n"
    return [
        Injected(
            "name-slow", "a name server that does not answer", names, "cat ~/hosts > /etc/hosts; > /etc/resolv.conf"
        ),
        Injected("mtu-differs", "another MTU", "ip link set eth0 mtu 1400", "ip link set eth0 mtu 1500"),
        Injected("link-broken", "a firewall that lets only Ray's ports through", drop, "nft delete table inet t"),
        Injected(
            "link-slow",
            "a link of 200 Mbit/s",
            "tc qdisc add dev eth0 root tbf rate 200mbit burst 64kb latency 50ms",
            "tc qdisc del dev eth0 root",
        ),
        Injected(
            "clock",
            "a clock 90 s ahead",
            f"printf '{shifted.encode('unicode_escape').decode()}' > {PACKAGES}/sitecustomize.py",
            f"rm {PACKAGES}/sitecustomize.py",
        ),
    ]


def of_the_model() -> list[Injected]:
    """Its folder on that host."""
    weights, config = MODEL / "model.safetensors", MODEL / "config.json"
    cut = f"cp {weights} ~/weights; truncate -s -5000 {weights}"
    back = f"cp ~/weights {weights}"
    return [
        Injected("model-broken", "no model folder", f"mv {MODEL} {MODEL}-away", f"mv {MODEL}-away {MODEL}"),
        Injected("model-broken", "no config.json", f"mv {config} ~/config", f"mv ~/config {config}"),
        Injected("model-broken", "a weights file cut off", cut, back),
        Injected("model-broken", "no weights file", f"cp {weights} ~/weights; rm {weights}", back),
        Injected(
            "model-broken",
            "a weights file with a broken header",
            f"cp {weights} ~/weights; printf XXXX | dd of={weights} bs=1 seek=20 conv=notrunc",
            back,
        ),
        Injected(
            "model-differs",
            "weights of another revision",
            f"cp {weights} ~/weights; printf XXXX | dd of={weights} bs=1"
            f" seek=$(( $(stat -c %s {weights}) - 9 )) conv=notrunc",
            back,
        ),
        Injected("model-differs", "no tokenizer", f"mv {MODEL}/tokenizer.json ~/t", f"mv ~/t {MODEL}/tokenizer.json"),
    ]


def of_commands(first: Host) -> list[Injected]:
    """What somebody types on the first host that can't be."""
    serve = f"argosy serve --device cpu --port 8123 --cpu-threads 1 {MODEL}"
    return [
        Injected(
            "no-cluster",
            "no Ray at the address",
            command=f"argosy serve --ray-address {first.address}:6399",
            expect="nobody answers there",
        ),
        Injected(
            "no-token",
            "a token that is not the cluster's",
            command=f"RAY_AUTH_TOKEN=deadbeef argosy serve --ray-address {first.address}:6379",
            expect="wants its token",
        ),
        Injected(
            "port-taken",
            "the port is taken",
            command="python -c 'import socket, os, sys; s = socket.create_server("
            f'("127.0.0.1", 8123)); sys.exit(os.system("{serve}") >> 8)\'',
            expect="port 8123 on 127.0.0.1 is taken",
        ),
        Injected(
            "host-wrong",
            "an address of nobody",
            command=f"{serve} --host 203.0.113.7",
            expect="no address of this machine",
        ),
        Injected("too-few", "more ranks in a group than a node has", command=f"{serve} -tp 64", expect="64"),
        Injected("layers-too-few", "more stages than layers", command=f"{serve} -pp 64", expect="layers"),
    ]


def of_ray() -> list[Injected]:
    """Last, since Ray there may not be what it was before."""
    raylet = "$(pgrep -o raylet)"
    return [
        Injected("interface-wrong", "GLOO_SOCKET_IFNAME of another machine", restart="GLOO_SOCKET_IFNAME=ib7"),
        Injected("environment-differs", "an NCCL setting on one node only", restart="NCCL_IB_DISABLE=1"),
        Injected("node-silent", "a node that hangs", f"kill -STOP {raylet}", f"kill -CONT {raylet}"),
    ]


def start_ray(host: Host, head: Host, more: str = "") -> None:
    """Ray on one host, with ports that a firewall can know."""
    role = "--head --port=6379 --include-dashboard=false" if host is head else f"--address={head.address}:6379"
    command = f"mkdir -p {RAY_TEMP}; RAY_TMPDIR={TEMP} TMPDIR={RAY_TEMP} RAY_health_check_failure_threshold=20 "
    command += f"{more} python -m argosy.deploy.ray_node "
    command += f"start {role} --node-ip-address={host.address} {RAY_PORTS} --num-cpus=2 --num-gpus=1 "
    command += "--object-store-memory=80000000 --disable-usage-stats"
    host.enter(command, timeout=90)


def wait_for_nodes(head: Host, count: int, seconds: float = 60.0) -> None:
    """Until so many are alive."""
    asked = "import ray; ray.init(address='auto', logging_level=50); print(sum(n['Alive'] for n in ray.nodes()))"
    deadline = time.monotonic() + seconds
    while head.enter(f"python -P -c {shlex.quote(asked)}", check=False).stdout.strip() != str(count):
        if time.monotonic() > deadline:
            raise RuntimeError(f"there are not {count} nodes after {seconds:g} s")


def examine(head: Host) -> tuple[list[dict[str, Any]], float]:
    """(faults, seconds of the whole command) as somebody sees who types it."""
    began = time.monotonic()
    done = head.enter(f"argosy doctor {MODEL} --ray-address auto --no-all-reduce --json", check=False, timeout=60)
    seconds = time.monotonic() - began
    if not done.stdout.startswith("{"):
        raise RuntimeError(f"the doctor failed: {done.stdout[-500:]} {done.stderr[-2000:]}")
    found: list[dict[str, Any]] = json.loads(done.stdout)["faults"]
    return found, seconds


def try_fault(fault: Injected, head: Host, odd: Host) -> dict[str, Any]:
    """Inject, ask, undo; a row of the table."""
    if fault.restart:
        odd.enter("ray stop --force", timeout=60)
        wait_for_nodes(head, 1)
        start_ray(odd, head, fault.restart)
        wait_for_nodes(head, 2)
    odd.enter(fault.inject)
    odd.enter("pkill -f 'ray::IDLE'", check=False)  # those that were started before the fault don't know of it
    try:
        if fault.command:
            began = time.monotonic()
            done = head.enter(fault.command, check=False, timeout=90)
            seconds = time.monotonic() - began
            lines = [line for line in done.stderr.splitlines() if fault.expect in line]
            named = done.returncode != 0 and bool(lines)
            line = lines[-1].strip() if lines else done.stderr[-300:]
        else:
            found, seconds = examine(head)
            hits = [row for row in found if row["check"] == fault.check and odd.address in row["node"]]
            named = bool(hits)
            row = (hits or found or [{"node": "", "found": "nothing", "fix": ""}])[0]
            line = f"{row['node']}: {row['found']} -> {row['fix']}"
    finally:
        odd.enter(fault.undo, check=False)
        odd.enter("pkill -f 'ray::IDLE'", check=False)
    line = line.replace(str(ROOT), "...").replace(RAY_TEMP, "$TMPDIR")
    return {"check": fault.check, "fault": fault.what, "named": named, "seconds": round(seconds, 1), "line": line}


@contextlib.contextmanager
def cluster() -> Iterator[tuple[Host, Host]]:
    """Two hosts with Ray, equal and sound, each with its own view of packages, sources and model."""
    hosts = Hosts(f"fa{os.getpid()}")
    copies = sorted({str(ROOT), sys.prefix} - {sys.prefix if Path(sys.prefix).is_relative_to(ROOT) else ""})
    try:
        head, odd = hosts.up(2, keep=kept_folders(), path=usual_path(), copies=copies)
        for host in (head, odd):
            (host.folder / "home" / "smi").write_text(CARD.format(host=host.index) + "\n")
            script = f"{sys.prefix}/bin/nvidia-smi"
            host.enter(f"printf %s {shlex.quote(SMI)} > {script}; chmod 755 {script}; mkdir -m 700 ~/.ray")
            host.enter(
                f"printf 00aa11bb22cc33dd44ee55ff66778899 > ~/.ray/auth_token; find {ROOT} -name __pycache__ -prune"
            )
            host.enter(set_version("torch", f"{version_of('torch')}+cu130"))
            start_ray(host, head)
        wait_for_nodes(head, 2)
        yield head, odd
    finally:
        hosts.down()


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="checks to try")
    parser.add_argument("--output", type=Path, help="where to write the rows as JSON lines")
    args = parser.parse_args()
    if why := missing_here():
        print(f"can't be run here: {why}", file=sys.stderr)
        return 2
    rows = []
    with cluster() as (head, odd):
        found, seconds = examine(head)
        print(f"sound: {found or 'no fault'} ({seconds:.1f} s)", flush=True)
        for fault in faults(head):
            if not args.only or fault.check in args.only:
                try:
                    rows.append(try_fault(fault, head, odd))
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    rows.append(
                        {"check": fault.check, "fault": fault.what, "named": False, "seconds": 0, "line": str(error)}
                    )
                row = rows[-1]
                print(
                    f"{'named' if row['named'] else 'MISSED'} {row['seconds']:5.1f} s  {row['fault']}: {row['line']}",
                    flush=True,
                )
    if args.output:
        args.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    late = [row for row in rows if not row["named"] or row["seconds"] > MOST_SECONDS]
    print(f"{len(rows) - len(late)} of {len(rows)} faults named in {MOST_SECONDS:g} s")
    return 1 if late else 0


if __name__ == "__main__":
    raise SystemExit(main())
