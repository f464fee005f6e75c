"""`argosy serve | chat | complete | submit | jobs | plan | ...`: flags to a frozen config, then the module at work.

The modules behind the commands are imported inside the commands: `argosy --help` needs neither torch nor Ray.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches

import argosy
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ConfigError, ServingError, WeightError
from argosy.deploy import batch_command, jobs_cli, plan_command, settings, simulate_command, standard_streams
from argosy.deploy.jobs_folder import choose_job_dir
from argosy.deploy.names_of_vllm import IGNORED
from argosy.deploy.setting_values import whole_number

_SERVE_EXAMPLES = """\
examples:
  argosy serve                                      the small model that ships with Argosy
  argosy serve Qwen/Qwen3-0.6B                      a model from the Hugging Face hub
  argosy serve ./my-model --port 8080               a folder with config.json and safetensors
  argosy serve ./my-model -tp 2 -pp 2               2 ranks share each layer, in 2 pipeline stages
  argosy serve --config serve.yaml                  flags from a file: 'max-num-seqs: 64', one a line
"""
_CHAT_EXAMPLES = """\
examples (a server must be running, see 'argosy serve'):
  argosy chat "What does a list comprehension do?"
  argosy chat                                       a conversation; Ctrl-D ends it
  echo "Explain this" | argosy chat
"""
_COMPLETE_EXAMPLES = """\
examples (a server must be running, see 'argosy serve'):
  argosy complete "Return a list of" --max-tokens 40
  argosy complete "Return a list of" --temperature 0 --url http://gpu-box:8000
"""
_BENCH_EXAMPLES = """\
examples:
  argosy bench                                       the default model in process, 64 mixed requests
  argosy bench --model tiny --workload cpu64 decode1 ttft512 --peer transformers
  argosy bench --url http://127.0.0.1:8000           a server that is running
  argosy bench --model 8b -tp 2                      an 8B shape with random weights on two GPUs
  argosy bench --model 8b --over http --backend ray  what the HTTP doors cost
  argosy bench --model 8b --calibration mine.json    what this GPU reaches, for 'argosy plan --calibration mine.json'
  argosy bench --suite h200                          the whole table beside vLLM's figures, on all GPUs of this host
"""


_USAGE = {
    "serve": ["[MODEL]"],
    "chat": ["[TEXT]"],
    "complete": ["[TEXT]"],
    "doctor": ["[MODEL]"],
    "bench": [],
    "plan": ["MODEL"],
    "simulate": ["MODEL"],
    "submit": ["FILE"],
    "batch": ["FILE", "--output", "FILE"],
    "jobs": ["[list|show|wait|results|cancel|resume]", "[JOB]"],
}
# commands of vLLM's, and how to have the same here
_MEANT = {
    "collect-env": "'argosy doctor' says what this machine has",
    "run-batch": "'argosy batch FILE --output FILE' does that",
    "calibrate": "'argosy bench --calibration FILE' does that",
}
_BENCHES = {
    "serve": "'argosy bench --url http://127.0.0.1:8000'",
    "throughput": "'argosy bench --workload fixed512x256'",
    "latency": "'argosy bench --workload decode1'",
    "startup": "'argosy bench --cold-start'",
}
_KEY_NAMES = ("ARGOSY_API_KEY", "VLLM_API_KEY")  # the second so that a server of vLLM can be replaced as it stands


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 fine, 1 it failed, 2 it was asked for something that can't be.

    141 when whoever read its output had enough (`| head`), as the shell says of any program.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    standard_streams.open_what_is_closed()
    standard_streams.write_what_can_be_written()
    parser = build_parser()
    try:
        code = _run(parser, words)
        sys.stdout.flush()  # here, where a closed pipe can be told from a failure
        return code
    except BrokenPipeError:
        if not standard_streams.is_output_closed():
            raise  # some other pipe
        return 141
    except KeyboardInterrupt:
        return 130
    except (ConfigError, WeightError) as error:
        print(f"argosy: {error}", file=sys.stderr)
        return 2
    except ServingError as error:
        print(f"argosy: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if not standard_streams.is_for_want_of_room(error):
            raise
        where = error.filename or "where standard output goes"
        print(f"argosy: no room is left: {where}; make some and try again", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The whole command line as a value; tests read the list of flags from it."""
    parser = argparse.ArgumentParser(
        prog="argosy",
        description="Serve large language models on a Ray cluster.",
        epilog="Start with 'argosy serve', then paste the curl line that it prints; 'argosy COMMAND --help' says more.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"argosy {argosy.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_serve(commands)
    _add_talk(commands, "chat", "talk to a server that is running", _CHAT_EXAMPLES)
    _add_talk(commands, "complete", "let a server that is running continue a text", _COMPLETE_EXAMPLES)
    doctor = _command(commands, "doctor", "check what this machine has, and how to mend what is missing", "")
    doctor.add_argument("model", nargs="?", help="a model folder to check as well")
    doctor.add_argument("--port", type=int, default=8000, help="the port that 'argosy serve' will use")
    doctor.add_argument("--json", action="store_true", help="the same for programs")
    doctor.add_argument(
        "--ray-address",
        metavar="TEXT",
        default=os.environ.get("RAY_ADDRESS"),
        help="host:port or auto: look at all nodes of this Ray cluster and their links (default: $RAY_ADDRESS)",
    )
    doctor.add_argument(
        "--no-all-reduce", action="store_true", help="with a cluster: leave out the sums, which take torch"
    )
    _add_bench(commands)
    plan = _command(commands, "plan", "say which layout a model would get on a cluster, and why", plan_command.EXAMPLES)
    plan_command.add_arguments(plan)
    what = "run a workload on a planned cluster in virtual time"
    simulate_command.add_arguments(_command(commands, "simulate", what, simulate_command.EXAMPLES))
    submit = _command(commands, "submit", "leave a file of requests with a server, as a job", jobs_cli.SUBMIT_EXAMPLES)
    jobs_cli.add_submit(submit)
    batch = _command(commands, "batch", "answer a file of requests without a server", batch_command.EXAMPLES)
    batch_command.add_arguments(batch)
    what = "list jobs, see how far they are, fetch their results, cancel, resume"
    jobs_cli.add_jobs(_command(commands, "jobs", what, jobs_cli.JOBS_EXAMPLES))
    return parser


def serving_config(words: Sequence[str], args: argparse.Namespace) -> ServingConfig:
    """The settings of `serve` from its file and its flags; a flag wins over the file."""
    given = settings.read_config_file(args.config) if args.config else {}
    names = {flag.field for flag in settings.SETTING_FLAGS}
    given |= {name: value for name, value in vars(args).items() if name in names}
    if args.model and args.model_flag and args.model != args.model_flag:
        raise ConfigError(f"two models given: {args.model!r} and --model {args.model_flag!r}; leave one out")
    given["model"] = settings.choose_model(args.model, args.model_flag, given.get("model"))
    job_dir = given.get("job_dir")
    given["job_dir"] = choose_job_dir(str(job_dir) if job_dir is not None else None)
    config, ignored = settings.make_config(settings.plan_what_is_open(given))
    if text := settings.describe_ignored([*ignored, *settings.take_ignored(words)[1]]):
        print(f"argosy: {text}", file=sys.stderr)
    return config


def _with_dashes(word: str) -> str:
    """A flag as we write it; vLLM takes --max_model_len as well."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _model_first(words: list[str]) -> list[str]:
    """`--model M` as the place where these commands take it."""
    if words[:1] and words[0] in ("doctor", "plan", "simulate"):
        for place, word in enumerate(words):
            if word == "--model" and words[place + 1 : place + 2]:
                return [words[0], words[place + 1], *words[1:place], *words[place + 2 :]]
            if word.startswith("--model="):
                return [words[0], word.partition("=")[2], *words[1:place], *words[place + 1 :]]
    return words


def _refuse_other_command(words: Sequence[str]) -> None:
    """Raise `ConfigError` with what was meant: a command of vLLM's by its name here, or the nearest of ours."""
    meant = _MEANT.get(words[0])
    if meant is None:
        near = get_close_matches(words[0], _USAGE, n=1)
        meant = f"did you mean 'argosy {near[0]}'?" if near else "'argosy --help' lists the commands"
    raise ConfigError(f"there is no command {words[0]!r}; {meant}")


def _run(parser: argparse.ArgumentParser, words: list[str]) -> int:
    words = _model_first([_with_dashes(word) for word in words])
    kept, _ = settings.take_ignored(words) if words[:1] == ["serve"] else (words, [])
    if words and not words[0].startswith("-") and words[0] not in _USAGE:
        _refuse_other_command(words)
    if words[:1] == ["bench"] and words[1:2] and words[1] in _BENCHES:
        raise ConfigError(f"'argosy bench' has no part {words[1]!r}: use {_BENCHES[words[1]]}")
    args, rest = parser.parse_known_args(kept)
    if args.command is None:
        if words:
            settings.refuse_unknown(words, known_flags=("--help", "--version"))
        parser.print_help()
        return 0
    if rest:
        taken = IGNORED if args.command == "serve" else ()
        names = [*flags_of(parser, args.command), *(f"--{name.replace('_', '-')}" for name in sorted(taken))]
        settings.refuse_unknown(rest, known_flags=names)
    settings.take_hub_token(getattr(args, "hf_token", ""), on_command_line=True)
    match args.command:
        case "serve":
            from argosy.deploy import server  # Ray: only when a server starts

            config = serving_config(words, args)
            return server.run(config, api_keys=serve_keys(args.api_key, config.server.api_keys_file))
        case "doctor":
            if args.ray_address and args.ray_address != "local":
                from argosy.deploy import doctor_cluster  # Ray: only when a cluster is asked for

                return doctor_cluster.main(
                    address=args.ray_address, model=args.model, with_sums=not args.no_all_reduce, as_json=args.json
                )
            from argosy.deploy import doctor  # imports torch and Ray to ask their versions

            return doctor.main(model=args.model, port=args.port, as_json=args.json)
        case "plan":
            return plan_command.main(args)
        case "simulate":
            return simulate_command.main(args)
        case "batch":
            return batch_command.main(args)
        case "submit" | "jobs":
            return jobs_cli.main(args)
        case "bench":
            from argosy.deploy import bench  # may import torch

            return bench.main(args)
        case _:
            from argosy.deploy import talk  # httpx

            return talk.main(args)


def serve_keys(given: list[str] | None, keys_file: str | None) -> tuple[str, ...]:
    """The keys that a server asks for: of its flag or of the environment, which nobody else can read.

    They leave the environment here, so that no process of the server inherits them.
    """
    from_environment = [key for key in (os.environ.pop(name, "") for name in _KEY_NAMES) if key]
    if given:
        hint = "ARGOSY_API_KEY or --api-keys-file keeps it private"
        print(f"argosy: a key on the command line is shown to all who can list processes; {hint}", file=sys.stderr)
        return tuple(given)
    return () if keys_file else tuple(dict.fromkeys(from_environment))


def flags_of(parser: argparse.ArgumentParser, command: str) -> list[str]:
    """Every flag that `command` takes."""
    choices = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    return sorted(name for action in choices[command]._actions for name in action.option_strings)


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str, examples: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        usage=" ".join(["argosy", name, *_USAGE[name], "[flags]"]),
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_serve(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    serve = _command(commands, "serve", "serve a model over an OpenAI-compatible HTTP endpoint", _SERVE_EXAMPLES)
    serve.add_argument("model", nargs="?", help="folder or hub name (default: the small model that ships with Argosy)")
    serve.add_argument("--model", dest="model_flag", metavar="MODEL", help="the same as a flag")
    serve.add_argument("--config", metavar="FILE", help="YAML file with any of the flags below; flags win over it")
    serve.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="accept only requests with this key; may be given several times (default: $ARGOSY_API_KEY)",
    )
    settings.add_flags(serve)


def _add_talk(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str, examples: str
) -> None:
    talk = _command(commands, name, text, examples)
    what = "the message" if name == "chat" else "the text to continue"
    talk.add_argument("text", nargs="?", help=f"{what} (default: from standard input)")
    talk.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    talk.add_argument("--model", help="which of its models (default: its first)")
    talk.add_argument("--api-key", default=os.environ.get("ARGOSY_API_KEY"), help="default: $ARGOSY_API_KEY")
    talk.add_argument("--max-tokens", type=int, default=256 if name == "chat" else 64, help="default: %(default)s")
    talk.add_argument("--temperature", type=float, help="0 is always the most likely token (default: the server's)")
    talk.add_argument("--stop", action="append", help="a text at which the answer ends; may be given several times")
    talk.add_argument("--seed", type=int, help="the same seed gives the same answer")
    if name == "chat":
        talk.add_argument("--system", help="how the model should behave")


def _add_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    bench = _command(commands, "bench", "measure: one JSON line a figure, a table last", _BENCH_EXAMPLES)
    bench.add_argument(
        "--model", default="default", help="default, tiny, small, 06b, 8b, 70b (random weights of those), or a folder"
    )
    bench.add_argument(
        "--workload", nargs="+", metavar="NAME", help="default: cpu64, or the usual ones of a GPU for its shapes"
    )
    bench.add_argument("--dtype", help="default: float32 for the models of CPUs, else the model's own")
    bench.add_argument("--quantization", "-q", help="as of 'argosy serve', such as fp8")
    bench.add_argument("--repeats", type=int, default=3, help="the median counts (default: %(default)s)")
    bench.add_argument("--output", metavar="FILE", help="append the JSON lines to this file")
    bench.add_argument(
        "--calibration",
        metavar="FILE",
        help="fit the device's ratios to the decode steps, for 'argosy plan --calibration'",
    )
    bench.add_argument("--note", default="", help="a word for the JSON lines, such as what was changed")

    where = bench.add_argument_group("what is measured")
    where.add_argument("--url", help="this server instead of an engine in process")
    where.add_argument("--api-key", default=os.environ.get("ARGOSY_API_KEY"), help="default: $ARGOSY_API_KEY")
    where.add_argument(
        "--over", choices=("engine", "http"), default="engine", help="http: an engine in process and behind its doors"
    )
    where.add_argument("--concurrency", type=int, nargs="+", help="with --url or --over http: requests at once")
    where.add_argument("--backend", default="local", choices=("ray", "local"), help="in process: with Ray or without")
    where.add_argument("--peer", choices=("transformers",), help="the same prompts with a peer, in the same run")
    where.add_argument("--cold-start", action="store_true", help="also measure process start to first token")

    table = bench.add_argument_group("a whole table")
    table.add_argument(
        "--suite", metavar="NAME", help="models and layouts beside vLLM's figures and goals: h200, a file"
    )
    table.add_argument(
        "--rows", nargs="+", metavar="PATTERN", help="only these, such as '8b-*/decode*' or 'super-linear'"
    )
    table.add_argument("--list", action="store_true", help="name the rows and stop")
    table.add_argument("--cards", type=int, help="cards to use, several engines at once (default: all of this host)")
    table.add_argument("--one-at-a-time", action="store_true", help="never two engines at the same time")

    engine = bench.add_argument_group("the engine")
    engine.add_argument("-tp", "--tensor-parallel-size", type=int, default=1, help="default: %(default)s")
    engine.add_argument("-pp", "--pipeline-parallel-size", type=int, default=1, help="default: %(default)s")
    engine.add_argument("--max-num-seqs", type=int, help="most requests at once (default: 32; on a GPU by the card)")
    engine.add_argument("--max-num-batched-tokens", type=int, help="most tokens in a step")
    engine.add_argument("--max-model-len", type=whole_number, help="default: 4096 for the shapes of GPUs")
    engine.add_argument("--gpu-memory-utilization", type=float, help="as of 'argosy serve'")
    engine.add_argument("--kv-cache-memory-bytes", type=whole_number, help="as of 'argosy serve'")
    engine.add_argument("--usable-memory", type=whole_number, metavar="BYTES", help="of each card, for everything")
    engine.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs; on CPUs no compiled steps")
    engine.add_argument("--cpu-threads", type=int, help="threads of each rank and of the peer (default: all cores)")


if __name__ == "__main__":
    raise SystemExit(main())
