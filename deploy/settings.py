"""From what people write (flags, keyword arguments, a YAML file) to one `ServingConfig`.

Names are vLLM's. A name we know and have no use for is taken and named in one warning; one we don't know is refused
with the nearest that we do. Nothing here needs torch or Ray.
"""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ConfigError
from argosy.deploy import device_defaults
from argosy.deploy.names_of_vllm import IGNORED, IGNORED_SWITCHES, NOT_YET, check_harmless, refuse_not_yet
from argosy.deploy.setting_values import KV_OFFLOADING, clean_value, swap_of_each_rank


class Flag(NamedTuple):
    """One flag of the command line and the setting it sets."""

    name: str
    kind: str  # text, int, float, gib, switch, list, json
    help: str
    setting: str = ""  # empty: the flag's name
    short: str = ""

    @property
    def field(self) -> str:
        """The setting in `ServingConfig`."""
        return self.setting or self.name.replace("-", "_")


FLAGS: Final[dict[str, tuple[Flag, ...]]] = {
    "model": (
        Flag("served-model-name", "list", "names that requests may use for it (default: the model's own)"),
        Flag("tokenizer", "text", "folder or hub name of the tokenizer (default: the model's)"),
        Flag("revision", "text", "branch, tag or commit of a model from the hub (default: main)"),
        Flag("tokenizer-revision", "text", "the same for the tokenizer (default: the model's)"),
        Flag("download-dir", "text", "folder for models from the hub (default: the hub's own cache)"),
        Flag("dtype", "text", "auto, float32, bfloat16 or float16; auto is what the folder says"),
        Flag("max-model-len", "int", "most tokens of prompt and answer together; 32k is 32768 (default: the model's)"),
        Flag("load-format", "text", "auto, safetensors, or dummy (random weights, to measure)"),
        Flag(
            "quantization",
            "text",
            "round plain weights: fp8, fp8_per_tensor, fp8_block, int8, int4 (default: what the folder says)",
            short="-q",
        ),
        Flag("load-in-8bit", "switch", "the same as --quantization int8, by transformers' name"),
        Flag("load-in-4bit", "switch", "the same as --quantization int4"),
        Flag("chat-template", "text", "a Jinja file or text instead of the model's own"),
        Flag("generation-config", "text", "auto (sampling defaults of the folder) or vllm (none)"),
        Flag("hf-overrides", "json", "JSON of values that replace those in config.json or its text_config"),
        Flag("skip-tokenizer-init", "switch", "serve token ids only"),
        Flag("max-logprobs", "int", "most log probabilities that a request may ask for at a position"),
        Flag("seed", "int", "seed of the random choices the engine makes itself"),
    ),
    "machines": (
        Flag(
            "tensor-parallel-size",
            "int",
            "ranks that share each layer, within one node where possible (default: as --layout says)",
            short="-tp",
        ),
        Flag(
            "pipeline-parallel-size",
            "int",
            "stages of consecutive layers, one node each where possible (default: the same)",
            short="-pp",
        ),
        Flag(
            "data-parallel-size",
            "int",
            "replicas of the whole model, behind one address (default: the same)",
            short="-dp",
        ),
        Flag(
            "pipeline-layers",
            "json",
            "layers of each stage as a JSON list, such as [10,14] (default: as even in time as 'argosy plan' finds, "
            "by room where the stages' devices have unequal free memory, even on CPUs)",
        ),
        Flag(
            "stage-memory-gb",
            "json",
            "GiB that each rank of a stage may use, as a JSON list such as [0,40]; 0: what "
            "there is (default: no bounds); layers are split to suit",
        ),
        Flag(
            "layout", "text", "auto or given (default: auto when none of the sizes above is given: see 'argosy plan')"
        ),
        Flag(
            "ray-address",
            "text",
            "host:port or auto: a Ray cluster to run in (default: $RAY_ADDRESS, or one of our own)",
        ),
        Flag("device", "text", "auto, cpu or cuda"),
        Flag("cpu-threads", "int", "threads of each rank on a CPU (default: cores divided by ranks)"),
        Flag("enable-expert-parallel", "switch", "whole experts on each rank of a group, not a part of each"),
        Flag("all2all-backend", "text", "how tokens reach whole experts: sum, all_to_all, or auto, the faster one"),
        Flag("enforce-eager", "switch", "no CUDA graphs; on CPUs no compiled steps"),
        Flag("start-deadline-seconds", "float", "longest that a start may take"),
        Flag("step-deadline-seconds", "float", "longest that one step may take before its rank counts as lost"),
    ),
    "memory": (
        Flag("gpu-memory-utilization", "float", "fraction of the device's memory that may be used, for everything"),
        Flag("kv-cache-memory-bytes", "int", "bytes for the KV cache of each rank, such as 2GiB; overrides the above"),
        Flag("num-gpu-blocks-override", "int", "number of KV blocks; overrides both"),
        Flag("block-size", "int", "tokens a KV block"),
        Flag(
            "kv-cache-dtype",
            "text",
            "auto, bfloat16, float16, float32; half the bytes: int8 and fp8_scaled (a scale "
            "for each token and head), fp8 (e4m3 as it is, or over the checkpoint's scales)",
        ),
        Flag(
            "swap-space",
            "text",
            "host memory of each rank for KV blocks that make room, in GiB (16, 16GiB, auto): requests are swapped and "
            "prefixes kept, where that is cheaper than computing them anew (default: 0)",
        ),
        Flag("kv-offloading-size", "text", "the same by vLLM's name, GiB of all ranks together (default: none)"),
        Flag(
            "cpu-offload-gb",
            "gib",
            "GiB of each rank's weights that stay in the host's memory, or auto: what it takes to fit (default: 0)",
        ),
        Flag(
            "activation-offload-gb",
            "gib",
            "GiB of the host's memory for hidden states of long steps, or auto (default: 0, none)",
        ),
        Flag("activation-slice-tokens", "int", "tokens of such a step that are computed at once (default: 4096)"),
        Flag("enable-prefix-caching", "switch", "keep blocks of finished requests for equal beginnings (default: on)"),
    ),
    "scheduling": (
        Flag(
            "max-num-seqs", "int", "most requests in one step (default: 256; by the GPU, up to 1024 on an H100 or H200)"
        ),
        Flag(
            "max-num-batched-tokens",
            "int",
            "most tokens in one step, prompts and answers together (default: 2048; by the GPU, up to 8192)",
        ),
        Flag("enable-chunked-prefill", "switch", "cut long prompts so that running answers don't wait (default: on)"),
        Flag("scheduling-policy", "text", "fcfs (first come) or priority", setting="policy"),
        Flag("async-scheduling", "switch", "prepare a step while the one before runs (default: on)"),
        Flag("max-num-waiting", "int", "most requests that wait; beyond it the answer is 503 with Retry-After"),
        Flag("request-deadline-seconds", "float", "longest that a request may take"),
    ),
    "server": (
        Flag("host", "text", "address to listen on (default: 127.0.0.1, this machine only)"),
        Flag("port", "int", "port to listen on (default: 8000)"),
        Flag("api-keys-file", "text", "file with one accepted API key a line"),
        Flag("max-body-bytes", "int", "largest request that is read (default: 4MiB)"),
        Flag("job-dir", "text", "folder of jobs and their files, or none (default: ~/.local/state/argosy/jobs)"),
        Flag("max-upload-bytes", "int", "largest file that /v1/files takes (default: 200MiB)"),
        Flag(
            "api-server-count",
            "int",
            "processes that requests and answers go through (default: one for 8 cores, up to 8)",
        ),
        Flag("drain-seconds", "float", "after Ctrl-C, how long running requests may take to end"),
        Flag("response-role", "text", "role of chat answers"),
        Flag("disable-log-stats", "switch", "no line of live figures every ten seconds"),
    ),
}

SETTING_FLAGS: Final[tuple[Flag, ...]] = tuple(flag for group in FLAGS.values() for flag in group)

# any of these makes a tokenizer; all but the first are converted by transformers
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")

_DEFAULTS: Final[Mapping[str, object]] = ServingConfig.defaults()
_SIZES = {"tensor_parallel_size", "pipeline_parallel_size", "pipeline_layers", "data_parallel_size", "layout"}


def default_model() -> str:
    """The folder of the model that ships with the package."""
    folder = Path(str(files("argosy"))) / "default_model"
    if not (folder / "config.json").is_file():
        raise ConfigError(f"the model that ships with Argosy is not at {folder}; name a model: argosy serve <model>")
    return str(folder)


def choose_model(*given: object) -> str:
    """The first model that was named, or the one that ships. Raises `ConfigError` where the name is empty."""
    name = next((one for one in given if one is not None), None)
    if name == "":
        raise ConfigError("model='': is empty, as a variable that isn't set is; name a model, or give none at all")
    return str(name) if name is not None else default_model()


def is_hub_name(model: str) -> bool:
    """Whether it may be the name of a model on the hub, such as Qwen/Qwen3-0.6B."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model) is not None


def add_flags(parser: argparse.ArgumentParser, *, without: Sequence[str] = ()) -> None:
    """Every setting's flag, in groups, with no defaults: what is not given stays out of the result."""
    for title, flags in FLAGS.items():
        if title in without:
            continue
        group = parser.add_argument_group(title)
        for flag in flags:
            names = [*([flag.short] if flag.short else []), f"--{flag.name}"]
            options: dict[str, Any] = {"dest": flag.field, "default": argparse.SUPPRESS, "help": _help_of(flag)}
            match flag.kind:
                case "switch":
                    group.add_argument(*names, action=argparse.BooleanOptionalAction, **options)
                case "list":
                    group.add_argument(*names, nargs="+", metavar="NAME", **options)
                case kind:
                    group.add_argument(*names, metavar=kind.upper(), **options)
    token = "the hub's key (default: $HF_TOKEN, or what 'hf auth login' keeps)"
    parser.add_argument("--hf-token", default="", metavar="TOKEN", help=token)


def _help_of(flag: Flag) -> str:
    """With the default, where the words say nothing of it and there is one that can be said."""
    default = _DEFAULTS.get(flag.field)
    if "(default" in flag.help or isinstance(default, bool) or not isinstance(default, str | int | float):
        return flag.help
    return f"{flag.help} (default: {default if isinstance(default, str) else format(default, 'g')})"


def take_hub_token(token: object, *, on_command_line: bool = False) -> None:
    """The hub's key goes to the hub's own library, by the environment, and never into our settings.

    True means the one that `hf auth login` keeps, which is looked for anyway.
    """
    if isinstance(token, str) and token:
        os.environ["HF_TOKEN"] = token
        if on_command_line:
            hint = "HF_TOKEN or 'hf auth login' keeps it private"
            print(
                f"argosy: a token on the command line is shown to all who can list processes; {hint}", file=sys.stderr
            )


def take_ignored(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line without vLLM's flags that have no effect here, and their names."""
    kept, ignored, is_value = [], [], False
    for place, word in enumerate(words):
        name = word.lstrip("-").split("=")[0].replace("-", "_").removeprefix("no_")
        if word.startswith("-O"):  # vLLM's levels of compilation: -O3, -O 3
            ignored.append("optimization_level")
            is_value = word == "-O"
            continue
        if word.startswith("--no-") and name in NOT_YET:
            continue  # turned off
        if word.startswith("--") and name in IGNORED:
            ignored.append(name)
            check_harmless(name, word.partition("=")[2] or "".join(words[place + 1 : place + 2]))
            is_value = name not in IGNORED_SWITCHES and "=" not in word
        elif not (is_value and not word.startswith("-")):
            kept.append(word)
            is_value = False
        else:
            is_value = False
    return kept, ignored


_BITS: Final[Mapping[str, str]] = {"load_in_8bit": "int8", "load_in_4bit": "int4"}  # as transformers calls it


def refuse_unknown(rest: Sequence[str], known_flags: Iterable[str] = ()) -> None:
    """Raise `ConfigError` for the first of the words that the parser had no use for."""
    for word in rest:
        if not word.startswith("-"):
            raise ConfigError(f"unexpected argument {word!r}; the model comes first, then flags")
        name = word.split("=")[0]
        refuse_not_yet(name, name.lstrip("-").replace("-", "_"))
        if name == "--dry-run":
            raise ConfigError("unknown flag --dry-run: 'argosy plan MODEL' says what would be chosen, and why")
        near = get_close_matches(name, [*known_flags], n=1)
        raise ConfigError(f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else ""))


def _check_bits(name: str, value: object, given: Mapping[str, object]) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: must be True or False")
    for other in ("quantization", *_BITS):
        if value and other != name and (asked := given.get(other)) not in (None, False, _BITS[name]):
            raise ConfigError(f"{name}=True and {other}={asked!r} ask for different roundings; leave one out")


def make_config(given: Mapping[str, object]) -> tuple[ServingConfig, list[str]]:
    """The settings from flat names, and which of the names have no effect. Raises `ConfigError`."""
    known: dict[str, object] = {}
    ignored: list[str] = []
    total: object = None  # of memory for all ranks
    settings = set(ServingConfig.known_settings())
    for key, value in given.items():
        name = str(key).replace("-", "_")
        name = {"scheduling_policy": "policy"}.get(name, name)
        if name == "hf_token":
            take_hub_token(value)
            continue
        if name in _BITS:
            _check_bits(name, value, given)
            if value:
                known["quantization"] = _BITS[name]
        elif name == KV_OFFLOADING:
            total = value
        elif (name, value) == ("load_format", "bitsandbytes"):  # as vLLM asks for rounding
            known.setdefault("quantization", "bitsandbytes")
        elif name in IGNORED:
            check_harmless(name, value)
            ignored.append(name)
        elif name in settings:
            known[name] = clean_setting(name, value)
        elif not refuse_not_yet(key, name, value):
            near = get_close_matches(name, [*settings, "scheduling_policy", KV_OFFLOADING, *sorted(IGNORED)], n=1)
            raise ConfigError(f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if total is not None:
        known["swap_space"] = swap_of_each_rank(total, known)
    return ServingConfig.from_mapping(device_defaults.fill(known)), ignored


def plan_what_is_open(given: Mapping[str, object], layout: str = "auto") -> dict[str, object]:
    """The settings of a server: where no size of the layout is named, the planner chooses all of them."""
    is_named = _SIZES & {str(name).replace("-", "_") for name in given}
    return dict(given) if is_named else {**given, "layout": layout}


def describe_ignored(ignored: Sequence[str]) -> str:
    """One sentence for all that had no effect, or nothing."""
    return f"accepted without effect: {', '.join(sorted(set(ignored)))}" if ignored else ""


def config_from_kwargs(model: str, kwargs: Mapping[str, object]) -> ServingConfig:
    """As `make_config`, for Python callers: what has no effect is one warning."""
    config, ignored = make_config({"model": model, **{k: v for k, v in kwargs.items() if v is not None}})
    if ignored:
        warnings.warn(describe_ignored(ignored), stacklevel=3)
    return config


def read_config_file(path: str) -> dict[str, object]:
    """Settings from a YAML file, by the flags' names with - or _. Raises `ConfigError` naming file and line."""
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: can't be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: no valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: must hold names and values, such as 'max-num-seqs: 64'")
    renamed = {flag.name.replace("-", "_"): flag.field for flag in SETTING_FLAGS}
    plain = {str(key).replace("-", "_"): value for key, value in content.items()}
    return {renamed.get(key, key): value for key, value in plain.items()}


def clean_setting(name: str, value: object) -> object:
    """The value in the type of its setting, where people write it in more than one way. Raises `ConfigError`."""
    return clean_value(name, next((flag.kind for flag in SETTING_FLAGS if flag.field == name), ""), value)
