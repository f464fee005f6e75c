#!/usr/bin/env python3
"""The Kubernetes manifest against KubeRay's own schema: every field known, every value of its kind.

    python tests/multi_host/kuberay_schema.py ray.io_rayservices.yaml

The argument is the CRD of a KubeRay release (helm-chart/kuberay-operator/crds in its repository). Fields it does not
know are errors here, where a cluster would drop them silently. Ends with 1 when there are any.
"""

import argparse
from pathlib import Path
from typing import Any

import jsonschema
import yaml

MANIFEST = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes" / "rayservice.yaml"


def strict(schema: Any) -> None:
    """Kubernetes' dialect as JSON schema, with unknown fields forbidden. Changes it in place."""
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("anyOf", None)
            schema["type"] = ["integer", "string"]
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        strict(part)


def problems(crd: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    """What the schema of the manifest's version says against it."""
    (schema,) = (
        version["schema"]["openAPIV3Schema"]
        for version in crd["spec"]["versions"]
        if f"{crd['spec']['group']}/{version['name']}" == manifest["apiVersion"]
    )
    strict(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    found = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    return sorted(f"{'/'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in found)


def main() -> int:
    """Check, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crd", type=Path)
    parser.add_argument("manifest", type=Path, nargs="?", default=MANIFEST)
    args = parser.parse_args()
    found = problems(yaml.safe_load(args.crd.read_text()), yaml.safe_load(args.manifest.read_text()))
    print("\n".join(found) or "the manifest is as the schema wants it")
    return min(len(found), 1)


if __name__ == "__main__":
    raise SystemExit(main())
