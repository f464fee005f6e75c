"""From flags, keyword arguments and files to one config; typos are named, vLLM's other flags are taken."""

import os
from pathlib import Path

import msgspec
import pytest

from argosy import LLM
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ConfigError, UnsupportedModel
from argosy.cluster.protocol.quant_spec import choose_quantization
from argosy.deploy import cli, names_of_vllm, settings


def serve_config(*words: str) -> ServingConfig:
    """What `argosy serve` makes of these words."""
    line = ["serve", *words]
    kept, _ = settings.take_ignored(line)
    args, rest = cli.build_parser().parse_known_args(kept)
    settings.refuse_unknown(rest, known_flags=cli.flags_of(cli.build_parser(), "serve"))
    return cli.serving_config(line, args)


def test_flags_as_users_of_vllm_write_them() -> None:
    """Short forms, units, negations, several names."""
    config = serve_config(
        "m", "-tp", "2", "--max-model-len", "32k", "--dtype", "half", "--no-enable-prefix-caching",
        "--kv-cache-memory-bytes", "2GiB", "--served-model-name", "a", "b", "--scheduling-policy", "priority",
    )  # fmt: skip
    assert config.model.model == "m"
    assert config.parallel.tensor_parallel_size == 2
    assert config.model.max_model_len == 32768
    assert config.model.dtype == "float16"
    assert config.cache.enable_prefix_caching is False
    assert config.cache.kv_cache_memory_bytes == 2 << 30
    assert config.model.served_model_name == ("a", "b")
    assert config.scheduler.policy == "priority"


def test_flags_without_effect_are_named_once_and_their_values_are_not_taken_for_the_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A command line that worked elsewhere should work here."""
    config = serve_config("--otlp-traces-endpoint", "/models", "--trust-remote-code", "m", "--hf-config-path=4")
    assert config.model.model == "m"
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "hf_config_path, otlp_traces_endpoint, trust_remote_code" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("m", "--max-modl-len", "3"), "did you mean --max-model-len"),
        (("m", "n"), "unexpected argument 'n'"),
        (("m", "--enable-lora"), "--enable-lora is not supported yet"),
        (("m", "--speculative-config={}"), "--speculative-config is not supported yet"),
        (("m", "--model", "n"), "two models"),
        (("m", "--block-size", "sixteen"), "must be a whole number"),
        (("m", "--max-num-batched-tokens", "1", "--max-num-seqs", "2"), "below max_num_seqs"),
        (("m", "--dtype", "float8"), "dtype='float8': must be one of auto, float32, bfloat16, float16"),
        (("m", "--drain-seconds", "nan"), "drain_seconds=nan: must be a finite number"),
        (("m", "--step-deadline-seconds", "0"), "step_deadline_seconds=0.0: must be"),
        (("m", "--request-deadline-seconds", "inf"), "request_deadline_seconds=inf: must be"),
        (("m", "--cpu-threads", "0"), "cpu_threads=0: must be at least 1"),
        (("m", "--max-logprobs", "-2"), "max_logprobs=-2: must be at least -1"),
        (("m", "--port", "70000"), "port"),
        (("m", "--max-num-batched-tokens", "0"), "max_num_batched_tokens=0: must be at least 1"),
        (("m", "--scheduling-policy", "fair"), "scheduling_policy='fair': must be one of fcfs, priority"),
        (("m", "--runner", "pooling"), "runner='pooling': only auto or generate is supported"),
        (("m", "--convert=embed"), "convert='embed': only auto or none is supported"),
        (("m", "--hf-overrides", "{"), "valid JSON"),
        (("m", "--config", "missing.yaml"), "missing.yaml: can't be read"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(words: tuple[str, ...], message: str) -> None:
    """With the name, the value and the way out."""
    with pytest.raises(ConfigError, match=message):
        serve_config(*words)


def test_a_file_sets_what_flags_leave_open(tmp_path: Path) -> None:
    """Flags win; names may be written with - or _."""
    file = tmp_path / "serve.yaml"
    file.write_text("model: m\nmax-num-seqs: 8\nmax_model_len: 4k\nscheduling-policy: priority\nport: 1\n")
    config = serve_config("--config", str(file), "--port", "2")
    assert (config.model.model, config.scheduler.max_num_seqs, config.model.max_model_len) == ("m", 8, 4096)
    assert (config.scheduler.policy, config.server.port) == ("priority", 2)


@pytest.mark.parametrize("text", ["- a\n- b\n", "max-num-seq: 3\nmodel: m\n", "a: [\n"])
def test_a_broken_file_is_refused(tmp_path: Path, text: str) -> None:
    """No YAML, no mapping, no such setting."""
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        serve_config("--config", str(file))


def test_keyword_arguments_of_llm() -> None:
    """One warning for what has no effect; None means not given; typos are named."""
    with pytest.warns(UserWarning, match="hf_config_path, tokenizer_mode"):
        config = settings.config_from_kwargs(
            "m", {"hf_config_path": 4, "tokenizer_mode": "auto", "max_model_len": None, "max_num_seqs": 4}
        )
    assert config.scheduler.max_num_seqs == 4
    with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
        settings.config_from_kwargs("m", {"max_num_seq": 4})


def test_every_setting_has_a_flag_or_a_reason() -> None:
    """A setting that no flag sets can only come from a file; those are these."""
    file_only = set(ServingConfig.known_settings()) - {flag.field for flag in settings.SETTING_FLAGS} - {"model"}
    assert file_only == {"max_recoveries", "watermark", "max_cuda_graph_batch", "hub_name"}
    assert not names_of_vllm.IGNORED & set(ServingConfig.known_settings())
    assert not names_of_vllm.NOT_YET & (names_of_vllm.IGNORED | set(ServingConfig.known_settings()))
    with pytest.raises(ConfigError, match="enable_lora is not supported yet"):
        settings.config_from_kwargs("m", {"enable_lora": True})


def test_small_weights_by_the_names_that_users_bring() -> None:
    assert settings.config_from_kwargs("some/model", {"load_in_8bit": True}).model.quantization == "int8"
    assert settings.config_from_kwargs("some/model", {"load_in_4bit": False}).model.quantization is None
    for second in ({"load_in_4bit": True}, {"quantization": "fp8"}):
        with pytest.raises(ConfigError, match=r"load_in_.bit=True and .*leave one out"):
            settings.config_from_kwargs("some/model", {"load_in_8bit": True, **second})
    for more in ({}, {"quantization": "bitsandbytes"}):  # in flight, as vLLM's users ask for it
        given = settings.config_from_kwargs("some/model", {"load_format": "bitsandbytes", **more}).model
        assert (given.quantization, given.load_format) == ("bitsandbytes", "auto")
    with pytest.raises(ConfigError, match="load_in_8bit='no': must be True or False"):
        settings.config_from_kwargs("some/model", {"load_in_8bit": "no"})
    plain = {"architectures": ["LlamaForCausalLM"]}
    for name, method in (("bitsandbytes", "int8"), ("int4", "int4")):
        found = choose_quantization(plain, name)
        assert found is not None
        assert found.method == method


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


@pytest.mark.parametrize(
    ("stored", "right", "wrong"),
    [
        (GPTQ, ("gptq", "gptq_marlin"), ("fp8", "awq", "bitsandbytes")),
        (BITSANDBYTES, ("bitsandbytes", "int8"), ("fp8", "int4")),
        (FP8, ("fp8", "fbgemm_fp8"), ("int8", "gptq")),
    ],
)
def test_a_packed_checkpoint_takes_its_own_names_alone(
    stored: dict[str, object], right: tuple[str, ...], wrong: tuple[str, ...]
) -> None:
    """Somebody asks for fp8 and names a checkpoint of 4 bits: that it would be served in 4 bits must be said."""
    for name in right:
        found = choose_quantization({"quantization_config": stored}, name)
        assert found is not None
        assert found.method == stored["quant_method"]
    for name in wrong:
        with pytest.raises(ConfigError, match=f"quantization='{name}': the model's weights are stored as"):
            choose_quantization({"quantization_config": stored}, name)


def test_four_bits_of_bitsandbytes_say_what_to_do_instead() -> None:
    """Their numbers are places in a table: no product of ours has one."""
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    with pytest.raises(UnsupportedModel, match=r"load_in_8bit: .*name the original model, with load_in_4bit=True"):
        choose_quantization({"quantization_config": nf4}, None)


def test_the_hubs_key_goes_to_the_hubs_library_and_into_no_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings are sent to other processes and kept by Ray; a key is not."""
    monkeypatch.setenv("HF_TOKEN", "old")
    config = settings.config_from_kwargs("m", {"hf_token": "hf_secret", "revision": "v1"})
    assert os.environ["HF_TOKEN"] == "hf_secret"
    assert b"hf_secret" not in msgspec.json.encode(config)
    settings.config_from_kwargs("m", {"hf_token": True})
    assert os.environ["HF_TOKEN"] == "hf_secret"
    settings.take_hub_token("hf_other", on_command_line=True)
    shown = capsys.readouterr().err
    assert "list processes" in shown
    assert "hf_other" not in shown


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quantization": 4}, "quantization=4: must be a text"),
        ({"pipeline_parallel_size": [4, 4]}, r"pipeline_parallel_size=\(4, 4\): must be a whole number"),
        ({"pipeline_layers": ["a"]}, r"pipeline_layers=\('a',\): each must be a whole number"),
        ({"enable_chunked_prefill": "yes"}, "enable_chunked_prefill='yes': must be true or false"),
        ({"hf_overrides": print}, "hf_overrides=.*: must be names and values"),
        ({"tokenizer": "x", "tokenizer_revision": 4}, "tokenizer_revision=4: must be a text"),
        ({"runner": "pooling"}, "runner='pooling': only auto or generate"),
        ({"logprobs_mode": "processed_logits"}, "logprobs_mode='processed_logits': only raw_logprobs"),
    ],
)
def test_a_value_of_a_wrong_kind_is_named_with_its_setting_and_the_kind(given: dict[str, object], message: str) -> None:
    """In our words, not those of a library; the name is the setting's own, not one that begins like it."""
    with pytest.raises(ConfigError, match=f"^{message}"):
        settings.make_config({"model": "m", **given})


def test_what_has_no_effect_may_be_said_as_long_as_it_asks_for_what_there_is() -> None:
    """A generating model is what is served."""
    _, ignored = settings.make_config({"model": "m", "runner": "generate", "convert": "none"})
    assert ignored == ["runner", "convert"]
    assert settings.take_ignored(["--runner", "generate", "m"]) == (["m"], ["runner"])


def test_the_help_tells_the_default_of_every_setting_that_has_one() -> None:
    """Numbers and words; what is found out by the model, the card or the planner is said in words."""
    texts = {flag.field: settings._help_of(flag) for flag in settings.SETTING_FLAGS if flag.kind != "switch"}
    untold = {field for field, text in texts.items() if "(default: " not in text}
    assert untold <= {"quantization", "chat_template", "hf_overrides", "kv_cache_memory_bytes",
                      "num_gpu_blocks_override", "api_keys_file"}  # fmt: skip  # none, and then nothing happens
    assert "(default: 0.92)" in texts["gpu_memory_utilization"]
    assert "(default: 60)" in texts["step_deadline_seconds"]


def test_host_memory_for_kv_by_the_name_of_vllm() -> None:
    """`kv_offloading_size` counts all ranks of a replica together, `swap_space` each of them."""
    for given, each in (
        ({}, 16.0),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, 4.0),
        ({"tensor_parallel_size": 4, "kv_offloading_backend": "native"}, 4.0),
    ):
        made, _ = settings.make_config({"model": "m", "kv_offloading_size": 16, **given})
        assert made.offload.swap_space == each, given
    assert settings.make_config({"model": "m", "kv-offloading-size": "512MiB"})[0].offload.swap_space == 0.5
    for given, said in (
        ({"kv_offloading_size": "much"}, "kv_offloading_size='much': must be a number of GiB for all ranks"),
        ({"kv_offloading_size": "auto"}, "must be a number"),
        ({"kv_offloading_size": 4, "swap_space": 4}, "the same memory; leave one out"),
        ({"kv_offloading_size": 4, "layout": "auto"}, "how many they are is planned: name --tensor-parallel-size"),
        ({"kv_offloading_backend": "lmcache"}, "only native is supported"),
    ):
        with pytest.raises(ConfigError, match=said):
            settings.make_config({"model": "m", **given})


def test_kinds_of_caches_are_named_as_people_write_them() -> None:
    """`fp8` is what most ask for, and was missing in the list of what may be asked for."""
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='int3': must be one of auto, .*fp8 \(fp8_e4m3\)"):
        settings.make_config({"model": "m", "kv_cache_dtype": "int3"})


def test_a_script_that_spells_out_what_it_does_not_use_runs() -> None:
    """`LLM(model, enable_lora=False, task="generate")`: what is turned off is not asked for."""
    off = {"enable_lora": False, "speculative_config": None, "override_generation_config": {}, "offload_group_size": 0,
           "enable_sleep_mode": False, "logits_processors": []}  # fmt: skip
    assert settings.make_config({"model": "m", **off})[1] == []
    others = {"task": "generate", "decode_context_parallel_size": 1, "max_loras": 1, "guided_decoding_backend": "auto"}
    assert settings.make_config({"model": "m", **others})[1] == list(others)
    for given, said in (
        ({"enable_lora": True}, "enable_lora is not supported yet; leave it out"),
        ({"offload_group_size": 8}, "not supported yet; leave it out; --cpu-offload-gb keeps weights"),
        ({"task": "embed"}, "task='embed': only auto or generate is supported yet"),
        ({"decode_context_parallel_size": 2}, "only 1 is supported yet"),
    ):
        with pytest.raises(ConfigError, match=said):
            settings.make_config({"model": "m", **given})


def test_an_empty_name_of_a_model_is_no_wish_for_the_default() -> None:
    """`argosy serve "$MODEL"` where nothing is set: a server of five million parameters answered."""
    assert settings.choose_model(None, "a", "b") == "a"
    assert settings.choose_model(None, None).endswith("default_model")
    for work in (
        lambda: settings.choose_model("", None),
        lambda: LLM(""),
        lambda: serve_config(""),
        lambda: serve_config("--model="),
    ):
        with pytest.raises(ConfigError, match="model='': is empty"):
            work()
