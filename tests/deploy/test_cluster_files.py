"""The files that people start clusters with, read by those who will read them: YAML, Ray, our own settings."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from argosy.cluster.protocol.config import ServerConfig, ServingConfig
from argosy.cluster.protocol.errors import ConfigError
from argosy.deploy import settings

pytest.importorskip("ray.serve")

import jsonschema
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from argosy.deploy import serve_app

ROOT = Path(__file__).resolve().parents[2]


def serve_configs() -> dict[str, dict[str, Any]]:
    """The one for `serve deploy`, and the one inside the Kubernetes manifest."""
    plain = yaml.safe_load((ROOT / "deploy" / "serve_config.yaml").read_text())
    manifest = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "rayservice.yaml").read_text())
    return {"serve_config": plain, "rayservice": yaml.safe_load(manifest["spec"]["serveConfigV2"])}


@pytest.mark.parametrize("name", ["serve_config", "rayservice"])
def test_ray_serve_and_we_take_the_config(name: str) -> None:
    """A misspelt option would show when a cluster starts."""
    config = serve_configs()[name]
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    assert application.import_path == "argosy.deploy.serve_app:build"
    (door,) = application.deployments
    assert door.name == "Door"
    assert isinstance(door.autoscaling_config, dict)
    assert door.autoscaling_config["min_replicas"] == 0
    made, ignored = settings.make_config(
        settings.plan_what_is_open({"model": settings.default_model(), **application.args}, "one")
    )
    assert made.parallel.layout == "one"
    assert ignored == []


def test_the_manifest_asks_for_tokens_and_shared_memory() -> None:
    """Without them anybody in the cluster could run code, and NCCL would have 64 MiB."""
    cluster = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "rayservice.yaml").read_text())["spec"][
        "rayClusterConfig"
    ]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert {"medium": "Memory", "sizeLimit": "8Gi"} in [volume.get("emptyDir") for volume in pod["volumes"]]
        assert any(mount["mountPath"] == "/dev/shm" for mount in pod["containers"][0]["volumeMounts"])


def cluster_variants() -> dict[str, dict[str, Any]]:
    """The file as it stands, and with each commented part in the place that it is meant for, by provider."""
    text = (ROOT / "ray_cluster.yaml").read_text()
    found = {"local": yaml.safe_load(text)}
    for variant in text.split("# provider:\n")[1:]:
        lines = []
        for line in f"# provider:\n{variant}".splitlines():
            if line in ("#", "") or not line.startswith("# "):
                break
            lines.append(line.removeprefix("# "))
        part = yaml.safe_load("\n".join(lines))
        replaced = ("provider", "auth", "min_workers", "max_workers")
        rest = {key: value for key, value in found["local"].items() if key not in replaced}
        found[part["provider"]["type"]] = {**rest, **part}
    return found


@pytest.mark.parametrize("name", ["local", "aws", "gcp"])
def test_ray_takes_the_cluster_file_and_its_variants(name: str) -> None:
    """By Ray's own validator, which `ray up` asks first: nobody should find a slip on the day of a move to a cloud."""
    cluster = cluster_variants()[name]
    validate_config(prepare_config(cluster))
    assert all("argosy.deploy.ray_node" in cluster[f"{kind}_start_ray_commands"][1] for kind in ("head", "worker"))
    if name == "local":
        assert cluster["max_workers"] == len(cluster["provider"]["worker_ips"])
    else:
        kinds = cluster["available_node_types"]
        assert cluster["head_node_type"] in kinds
        assert all(kind["node_config"] for kind in kinds.values())


def test_ray_would_refuse_a_slip() -> None:
    """The validator is asked with what it can say no to."""
    cluster = cluster_variants()["aws"]
    cluster["available_node_types"]["gpu"]["node_confg"] = {}
    with pytest.raises(jsonschema.ValidationError, match="node_confg"):
        validate_config(prepare_config(cluster))


def test_doors_follow_the_cores_unless_their_number_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop has one; a host of many cards makes more events than one process can write."""
    for cores, doors in ((2, 1), (15, 1), (16, 2), (64, 8), (256, 8)):
        monkeypatch.setattr(serve_app.os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert serve_app.num_doors(ServerConfig()) == doors
    assert serve_app.num_doors(ServerConfig(api_server_count=3)) == 3
    with pytest.raises(ConfigError, match="api_server_count"):
        ServingConfig.from_mapping({"model": "m", "api_server_count": 0})
