"""The training data as an MLflow dataset, from the manifest that `prepare` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskdm.config import paths

if TYPE_CHECKING:
    from mlflow.entities import Run

    from maskdm.tracking.store import Store

MANIFEST = "manifest.json"
MAX_DIGEST = 36  # mlflow's limit
CONTEXT = "mlflow.data.context"
DatasetEntry = dict[str, str]  # the fields of mlflow's Dataset


def read_dataset(base: Path = Path()) -> DatasetEntry | None:
    """Describe the dataset in results/ as MLflow does.

    Args:
        base: the folder that results/ is in.

    Returns:
        name, digest, source, schema and profile; None where there is no dataset, or none that can be read.
    """
    try:
        manifest = json.loads((base / paths.DATA / MANIFEST).read_text(encoding="utf-8"))
        return _describe(manifest)
    except (OSError, ValueError, KeyError, TypeError):  # the stage itself says what is wrong with it
        return None


def add_dataset(store: Store, run: Run, dataset: DatasetEntry) -> None:
    """Note what a run was trained on, once."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    if identity(dataset) not in datasets_of(run):
        inputs = DatasetInput(Dataset(**dataset), [InputTag(CONTEXT, "training")])
        store.client.log_inputs(run.info.run_id, [inputs])


def datasets_of(run: Run) -> set[tuple[str, str]]:
    """Name and digest of what a run was trained on."""
    entries = [] if run.inputs is None else run.inputs.dataset_inputs
    return {(entry.dataset.name, entry.dataset.digest) for entry in entries}


def identity(dataset: DatasetEntry) -> tuple[str, str]:
    """What tells one dataset from another."""
    return dataset["name"], dataset["digest"]


def _describe(manifest: dict[str, Any]) -> DatasetEntry:
    count, labels = int(manifest["count"]), manifest["labels"]
    classes = len(labels["class_names"]) if labels else 0
    kind, root = manifest["source"]["kind"], manifest["source"]["root"]
    name = f"scikit-learn {kind}" if kind == "digits" else str(kind)
    source = {"uri": root} if root else {"tags": {"mlflow.source.name": name}}
    tensor = {"dtype": manifest["dtype"], "shape": [-1, *manifest["shape"]]}
    features = json.dumps([{"type": "tensor", "tensor-spec": tensor}])
    return {
        "name": str(kind),
        "digest": str(manifest["sha256"])[:MAX_DIGEST],
        "source_type": "local" if root else "code",
        "source": json.dumps(source),
        "schema": json.dumps({"mlflow_tensorspec": {"features": features, "targets": None}}),
        "profile": json.dumps({"num_rows": count, "num_classes": classes, "num_skipped": len(manifest["skipped"])}),
    }
