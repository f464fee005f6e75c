#!/usr/bin/env python3
"""`ray up` with the repository's own ray_cluster.yaml over hosts out of namespaces, one pipeline stage on each.

    sudo python tests/multi_host/ray_up.py --hosts 3

Makes the hosts, starts the cluster, serves the model that ships with a stage on each host, asks for tokens from
outside, takes everything down again, and prints what each command took. The same prompts on one host must give the same
tokens. Ends with 1 when anything failed or differed. The last line is JSON for programs.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from hosts import TEMP, Host, Hosts, kept_folders, missing_here, usual_path

ROOT = Path(__file__).resolve().parents[2]
READY = b"Argosy is ready"
COMMAND_SECONDS = 240.0
MAX_TOKENS, LONG_TOKENS = 24, 230
PROMPTS = ["Return a list of", "The function", "What does len do?", "A class that holds"]


class Timer:
    """The seconds of each command, told as they come."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)
        print(f"{self.seconds[name]:7.1f} s  {name}", flush=True)


def cluster_file(hosts: Hosts, folder: Path) -> Path:
    """The repository's own file with these hosts' addresses. The repository is on their disk: nothing is copied."""
    content = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    addresses = [host.address for host in hosts.all]
    content["provider"] |= {"head_ip": addresses[0], "worker_ips": addresses[1:]}
    content["auth"] = {"ssh_user": "root", "ssh_private_key": str(hosts.key)}
    content["min_workers"] = content["max_workers"] = len(addresses) - 1
    content["file_mounts"].pop("~/argosy")
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def environment_of(folder: Path) -> dict[str, str]:
    """A home of its own: Ray keeps tokens, keys and caches there."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "HOME": str(folder), "TMPDIR": str(folder), "PATH": usual_path(), "PYTHONSAFEPATH": "1"}


def run(words: list[str], environment: dict[str, str], log: Path) -> None:
    """One command to its end, its output in the log."""
    with log.open("ab") as file:
        done = subprocess.run(
            words, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
            timeout=COMMAND_SECONDS, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(words)} ended with {done.returncode}:\n{log.read_text()[-4000:]}")


def ask(address: str, prompt: str, **more: Any) -> dict[str, Any]:
    """One greedy completion."""
    body = {"model": "argosy-default", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "logprobs": 1}
    body |= more
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: dict[str, Any] = json.load(answer)
    return found["choices"][0]


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not within {seconds:g} s")
        time.sleep(0.2)


@contextlib.contextmanager
def served(cluster: Path, port: int, flags: list[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    """`ray exec ... 'argosy serve'` until it says that it is ready; Ctrl-C at the end."""
    command = shlex.join(["argosy", "serve", *flags])
    with log.open("ab") as file:
        server = subprocess.Popen(
            ["ray", "exec", "--no-config-cache", "--port-forward", str(port), str(cluster), command],
            env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            wait_for(lambda: READY in log.read_bytes() or server.poll() is not None, COMMAND_SECONDS, "argosy serve")
            if READY not in log.read_bytes():
                raise RuntimeError(f"argosy serve ended with {server.returncode}:\n{log.read_text()[-4000:]}")
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):  # ended already
                os.killpg(server.pid, signal.SIGINT)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def free_port() -> int:
    """Of this machine, and most likely of the head: both ends of the tunnel have the same number."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def actors_of(host: Host) -> str:
    """Our processes on that host."""
    return host.enter("pgrep -af 'ray::(DriverActor|WorkerActor)'", check=False).stdout


def answers_under_losses(address: str, hosts: Hosts) -> bool:
    """Whether long answers are the same while a driver, and then a rank of the last host, is killed under them."""

    def all_long() -> list[str]:
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            asked = [pool.submit(ask, address, prompt, max_tokens=LONG_TOKENS, ignore_eos=True) for prompt in PROMPTS]
            return [one.result()["text"] for one in asked]

    whole, same = all_long(), True
    for host, kind in ((hosts.all[0], "DriverActor"), (hosts.all[-1], "WorkerActor")):
        with ThreadPoolExecutor(1) as pool:
            disturbed = pool.submit(all_long)
            time.sleep(0.5)
            host.enter(f"pgrep -f 'ray::{kind}' | head -n 1 | xargs kill -9")
            was_early = not disturbed.done()
            began = time.monotonic()
            found = disturbed.result() == whole
            print(
                f"{time.monotonic() - began:7.1f} s  answers ended after kill -9 of a {kind}; the same: {found}",
                flush=True,
            )
            same = same and found and was_early
    return same


def serve_and_ask(
    hosts: Hosts, args: argparse.Namespace, folder: Path, log: Path, timer: Timer, result: dict[str, Any]
) -> None:
    """From hosts without anything to answers, and to nothing again; `result` has what came as far as it came."""
    environment = environment_of(folder)
    with timer("make the hosts"):
        hosts.up(args.hosts, keep=kept_folders(), path=usual_path(), copies=[])
    cluster = cluster_file(hosts, folder)
    began = time.monotonic()
    with timer("ray get-auth-token --generate"):
        run(["ray", "get-auth-token", "--generate"], environment, folder / "token-log")
        (folder / "token-log").unlink()
    with timer("ray up -y ray_cluster.yaml"):
        run(["ray", "up", "-y", "--no-config-cache", str(cluster)], environment, log)
    port = free_port()
    flags = f"--port {port} --dtype float32 --max-model-len 256 --num-gpu-blocks-override 64 --cpu-threads 1".split()
    flags += shlex.split(args.flags) if args.flags is not None else ["-pp", str(args.hosts)]
    address = f"http://127.0.0.1:{port}"  # through the tunnel that 'ray exec' keeps
    with timer("ray exec ray_cluster.yaml --port-forward ... 'argosy serve'"):
        server = contextlib.ExitStack()
        server.enter_context(served(cluster, port, flags, environment, log))
    with server:
        answers = [ask(address, PROMPTS[0])]
        result["first_token_seconds"] = round(time.monotonic() - began, 1)
        answers += [ask(address, prompt) for prompt in PROMPTS[1:]]
        result["ranks"] = {host.address: actors_of(host).count("WorkerActor") for host in hosts.all}
        result["answers"] = [answer["logprobs"]["tokens"] for answer in answers]
        result["layout"] = next(
            line.split("layout", 1)[1].strip() for line in log.read_text().splitlines() if "  layout " in line
        )
        print(f"first token {result['first_token_seconds']} s after the first command; {result['layout']}")
        print(f"ranks on each host: {result['ranks']}")
        if args.kill:
            result["same_under_losses"] = answers_under_losses(address, hosts)
    with timer("Ctrl-C, until no driver and no rank is left"):
        wait_for(lambda: not any(actors_of(host) for host in hosts.all), 60, "the end of drivers and ranks")
    with timer("ray down -y ray_cluster.yaml"):
        run(["ray", "down", "-y", str(cluster)], environment, log)


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--flags", default=None, help="of 'argosy serve' (default: a stage on each host)")
    parser.add_argument("--kill", action="store_true", help="kill a driver and a rank under long answers, as well")
    parser.add_argument("--keep", action="store_true", help="leave all running, to look at (hosts.py --name ... down)")
    args = parser.parse_args()
    if why := missing_here():
        print(f"can't be run here: {why}", file=sys.stderr)
        return 2
    hosts, timer, result = Hosts(f"up{os.getpid()}"), Timer(), {}
    with tempfile.TemporaryDirectory(prefix="ru", dir=TEMP) as name:
        folder, log = Path(name), Path(name) / "log"
        try:
            serve_and_ask(hosts, args, folder, log, timer, result)
        finally:
            with contextlib.suppress(OSError):  # no log yet
                if "answers" not in result:
                    print(log.read_text()[-6000:], file=sys.stderr)
            if args.keep:
                print(f"kept: python tests/multi_host/hosts.py --name {hosts.name} exec 0 -- ray status")
            else:
                hosts.down()
    with timer("the same on one host"):
        same = on_one_host() == result["answers"]
    print(json.dumps({**result, "same_tokens_as_one_host": same, "seconds": timer.seconds}))
    return 0 if same and result.get("same_under_losses", True) else 1


def on_one_host() -> list[list[str]]:
    """What one rank without Ray says to the same prompts."""
    from argosy import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=0)
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "num_gpu_blocks_override": 64}
    with LLM(distributed_executor_backend="mp", cpu_threads=1, **options) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        tokenizer = llm.get_tokenizer()
        return [[tokenizer.decode([token]) for token in output.outputs[0].token_ids] for output in outputs]


if __name__ == "__main__":
    raise SystemExit(main())
