#!/usr/bin/env python3
"""Several hosts on one machine, out of Linux namespaces: each with its own address, sshd, processes, /tmp and home.

    sudo python tests/multi_host/hosts.py up 3        # 10.201.0.10, .11 and .12; `ray up` can log into them
    sudo python tests/multi_host/hosts.py exec 1 -- nproc
    sudo python tests/multi_host/hosts.py cut 1       # pull its cable; `heal 1` puts it back
    sudo python tests/multi_host/hosts.py down

Needs root, iproute2, util-linux, openssh-server and rsync. The hosts hang on a bridge of their own that leads nowhere
else. They share the disk, except that each may be given a copy-on-write view of some folders (`--copy`), so that one
can change what only it sees.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BASE = Path("/run/argosy-hosts")
HOME = "/root"  # of who logs in: namespaces take root
TEMP = "/tmp"  # each host has its own, as it has its own home
FIRST_HOST_NUMBER = 10
NEEDED = ("ip", "unshare", "nsenter", "ssh", "sshd", "ssh-keygen", "rsync", "mount")
_UP_SECONDS = 20.0


def missing_here() -> str:
    """Why hosts can't be made on this machine; empty when they can."""
    if os.geteuid() != 0:
        return "needs root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if lacking := [name for name in NEEDED if shutil.which(name, path=path) is None]:
        return f"not installed: {', '.join(lacking)}"
    probe = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--net", "--fork"]
    probe += ["ip", "link", "add", "probe", "type", "bridge"]  # gone with its namespace
    if subprocess.run(probe, capture_output=True, timeout=10, check=False).returncode != 0:
        return "namespaces are not allowed here"
    return ""


class Host:
    """One of the hosts."""

    def __init__(self, index: int, address: str, folder: Path, namespace: str):
        self.index, self.address, self.folder, self.namespace = index, address, folder, namespace

    @property
    def init_pid(self) -> int:
        """The process that is number 1 in there."""
        unshare = int((self.folder / "pid").read_text())
        return int(Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()[0])

    def enter(self, command: str, *, timeout: float = 30.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a shell command in it, by the machine's own root: quicker than a login, and not stopped by a firewall."""
        words = ["nsenter", "-t", str(self.init_pid), "-m", "-u", "-i", "-n", "-p", "bash", "-c"]
        done = subprocess.run(
            [*words, f". ~/.bashrc; {command}"],
            capture_output=True, text=True, timeout=timeout, check=False,
            env={"HOME": HOME}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise RuntimeError(f"{self.namespace}: {command!r} ended with {done.returncode}: {done.stderr[-2000:]}")
        return done

    def ssh(self, command: str) -> list[str]:
        """The words that run a command in it as somebody who logs in."""
        options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=3"]
        key = str(self.folder.parent / "key")
        return ["ssh", "-q", "-i", key, *options, f"root@{self.address}", f". ~/.bashrc; {command}"]


class Hosts:
    """All of them, in a folder that says what there is: a later process can find and end them."""

    def __init__(self, name: str = "argosy"):
        self.name, self.folder = name, BASE / name
        self.bridge = f"{name[:10]}-br"

    @property
    def all(self) -> list[Host]:
        """In order of their numbers."""
        state = json.loads((self.folder / "state.json").read_text())
        return [Host(**(row | {"folder": Path(row["folder"])})) for row in state["hosts"]]

    @property
    def key(self) -> Path:
        """The private key that opens each host to root."""
        return self.folder / "key"

    def up(self, count: int, *, keep: list[str], path: str, copies: list[str]) -> list[Host]:
        """Make them; `keep` are folders below /tmp or /root that all must see, `copies` those each sees for itself."""
        self.folder.mkdir(parents=True)
        self.folder.chmod(0o711)
        Path("/run/sshd").mkdir(exist_ok=True)
        net = _free_net()
        _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "host_key"))
        keys = self.folder / "authorized_keys"
        shutil.copy(f"{self.key}.pub", keys)
        keys.chmod(0o600)
        hosts = [
            Host(i, f"{net}.{FIRST_HOST_NUMBER + i}", self.folder / str(i), f"{self.name}-{i}") for i in range(count)
        ]
        rows = [{**vars(host), "folder": str(host.folder)} for host in hosts]
        (self.folder / "state.json").write_text(json.dumps({"hosts": rows, "bridge": self.bridge}))
        _do("ip", "link", "add", self.bridge, "type", "bridge")
        _do("ip", "addr", "add", f"{net}.1/24", "dev", self.bridge)
        _do("ip", "link", "set", self.bridge, "up")
        for host in hosts:
            self._start(host, hosts, keep, path, copies)
        deadline = time.monotonic() + _UP_SECONDS
        for host in hosts:
            while subprocess.run(host.ssh("true"), capture_output=True, timeout=10, check=False).returncode != 0:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{host.namespace} takes no logins: {(host.folder / 'init.log').read_text()}")
                time.sleep(0.1)
        return hosts

    def _start(self, host: Host, hosts: list[Host], keep: list[str], path: str, copies: list[str]) -> None:
        (host.folder / "tmp").mkdir(parents=True)
        (host.folder / "tmp").chmod(0o1777)
        (host.folder / "home").mkdir(mode=0o700)
        (host.folder / "home" / ".bashrc").write_text(f"export PATH={shlex.quote(path)}\n")
        # names without a name server: whoever asks for one that is not here would wait ten seconds
        names = "".join(f"{other.address} {other.namespace}\n" for other in hosts)
        (host.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}{_gateway(host)} gateway\n")
        (host.folder / "resolv.conf").write_text("options timeout:1 attempts:1\n")
        cable = self._cable(host)
        _do("ip", "netns", "add", host.namespace)
        _do("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
        _do("ip", "link", "set", cable, "master", self.bridge, "up")
        for words in (
            f"addr add {host.address}/24 dev eth0",
            "link set lo up",
            "link set eth0 up",
            f"route add default via {_gateway(host)}",  # asked for by all who want to know their own address
        ):
            _do("ip", "-n", host.namespace, *words.split())
        (host.folder / "sshd_config").write_text(
            f"ListenAddress {host.address}\nHostKey {self.folder}/host_key\n"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nStrictModes no\nUsePAM no\nPidFile none\n"
            "MaxStartups 64\nMaxSessions 64\n"
        )
        script = host.folder / "init.sh"
        script.write_text(_init_script(host, keep, copies))
        script.chmod(0o700)
        isolated = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        with open(host.folder / "init.log", "wb") as log:
            started = subprocess.Popen(
                ["ip", "netns", "exec", host.namespace, *isolated, str(script)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env={"PATH": path},
            )  # fmt: skip
        (host.folder / "pid").write_text(str(started.pid))

    def _cable(self, host: Host) -> str:
        return f"{self.name[:10]}-v{host.index}"

    def cut(self, index: int, *, is_cut: bool = True) -> None:
        """Pull a host's cable, or put it back."""
        _do("ip", "link", "set", self._cable(self.all[index]), "down" if is_cut else "up")

    def down(self) -> None:
        """End all of it; does what is left to do when some of it is gone already."""
        if not (self.folder / "state.json").is_file():
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for host in self.all:
            with contextlib.suppress(OSError, ValueError):  # gone already
                os.kill(int((host.folder / "pid").read_text()), signal.SIGKILL)
        time.sleep(0.3)
        for host in self.all:
            _do("ip", "netns", "del", host.namespace, check=False)
            _do("ip", "link", "del", self._cable(host), check=False)
        _do("ip", "link", "del", self.bridge, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def _gateway(host: Host) -> str:
    return f"{host.address.rpartition('.')[0]}.1"


def kept_folders(*more: str) -> list[str]:
    """What this Python needs and a host would not see: it has a /tmp and a /root of its own."""
    needed = {str(Path(__file__).resolve().parents[2]), sys.prefix, sys.base_prefix, *more}
    return sorted(name for name in needed if name.startswith((f"{TEMP}/", f"{HOME}/")))


def usual_path() -> str:
    """This Python's programs, then the system's."""
    return f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


def _init_script(host: Host, keep: list[str], copies: list[str]) -> str:
    """What number 1 does: make the host's own places, take logins, and bury the dead (Ray waits for orphans to go)."""
    lines = ["#!/usr/bin/env bash", "set -e", f"hostname {host.namespace}", "mount --make-rprivate /"]
    for number, folder in enumerate(copies):
        own = f"{host.folder}/copy{number}"
        lines += [f"mkdir -p {own}", f"mount -t tmpfs tmpfs {own}", f"mkdir {own}/changed {own}/work"]
        options = f"lowerdir={folder},upperdir={own}/changed,workdir={own}/work"
        lines.append(f"mount -t overlay overlay -o {options} {folder}")
    for folder in keep:
        place = folder.replace(f"{HOME}/", str(host.folder / "home") + "/", 1) if folder.startswith(f"{HOME}/") else ""
        place = place or folder.replace(f"{TEMP}/", f"{host.folder}/tmp/", 1)
        lines += [f"mkdir -p {shlex.quote(place)}", f"mount --rbind {shlex.quote(folder)} {shlex.quote(place)}"]
    lines += [
        f"mount --bind {host.folder}/hosts /etc/hosts",
        f"mount --bind {host.folder}/resolv.conf /etc/resolv.conf",
        "mount -t tmpfs -o mode=1777,size=2g tmpfs /dev/shm",
        f"mount --rbind {host.folder}/tmp {TEMP}",
        f"mount --rbind {host.folder}/home {HOME}",
        f"export HOME={HOME}; cd /; set +e",
        f"/usr/sbin/sshd -D -e -f {host.folder}/sshd_config 2>{host.folder}/sshd.log &",
        "while :; do wait -n || sleep 0.2; done",
    ]
    return "\n".join(lines) + "\n"


def _free_net() -> str:
    used = subprocess.run(["ip", "-o", "-4", "addr"], capture_output=True, text=True, timeout=10, check=True).stdout
    return next(net for net in (f"10.201.{i}" for i in range(256)) if f" {net}." not in used)


def _do(*words: str, check: bool = True) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")


def main() -> int:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="argosy", help="of this set of hosts (default: %(default)s)")
    commands: Any = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up")
    up.add_argument("count", type=int)
    up.add_argument("--copy", action="append", default=[], help="a folder that each host sees for itself")
    for name in ("cut", "heal"):
        commands.add_parser(name).add_argument("index", type=int)
    run = commands.add_parser("exec")
    run.add_argument("index", type=int)
    run.add_argument("words", nargs="+")
    commands.add_parser("down")
    args = parser.parse_args()
    hosts = Hosts(args.name)
    if args.command == "up":
        if why := missing_here():
            print(f"no hosts can be made: {why}", file=sys.stderr)
            return 2
        for host in hosts.up(args.count, keep=kept_folders(), path=usual_path(), copies=args.copy):
            print(f"{host.namespace} {host.address}   {' '.join(host.ssh('')[:-1])}")
    elif args.command == "exec":
        return subprocess.run(hosts.all[args.index].ssh(" ".join(args.words)), check=False).returncode
    elif args.command == "down":
        hosts.down()
    else:
        hosts.cut(args.index, is_cut=args.command == "cut")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
