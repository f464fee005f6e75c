"""The files that people start clusters with, read by those who will read them: YAML, Ray, our own settings."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from argosy.deploy import settings

pytest.importorskip("ray.serve")

from ray.serve.schema import ServeDeploySchema

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


def test_the_cluster_file_is_whole_and_so_are_its_variants() -> None:
    """The commented parts are YAML, too: nobody should find a tab in them on the day of a move to AWS."""
    text = (ROOT / "ray_cluster.yaml").read_text()
    cluster = yaml.safe_load(text)
    assert cluster["max_workers"] == len(cluster["provider"]["worker_ips"])
    assert all("argosy.deploy.ray_node" in cluster[f"{kind}_start_ray_commands"][1] for kind in ("head", "worker"))
    variants = text.split("# provider:\n")[1:]
    assert len(variants) == 2
    for variant in variants:
        lines = []
        for line in f"# provider:\n{variant}".splitlines():
            if line in ("#", "") or not line.startswith("# "):
                break
            lines.append(line.removeprefix("# "))
        found = yaml.safe_load("\n".join(lines))
        assert found["provider"]["type"] in ("aws", "gcp")
        assert found["head_node_type"] in found["available_node_types"]
