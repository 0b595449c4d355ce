"""The final models of the arms in MLflow's registry: a version per arm, under the experiment's name.

A version is made of the first seed's last averaged weights. Equal weights and params make no new version. Every arm
has an alias of its name, and the arm with the best mean of the headline's score, FID as a rule, of those whose seeds
are all there, is `best`.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskdm.base.checksums import file_sha256
from maskdm.config import Params, parse_params, paths
from maskdm.scoring.headline import Headline, flat_scores, headline_of
from maskdm.tracking.logged_model import save_model
from maskdm.tracking.run_content import finite, read_json
from maskdm.tracking.store import ArmKey, Store

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

BEST = "best"
DIGEST_TAG = "maskdm.model"
ALIASES_TAG = "maskdm.aliases"  # of the registered model: which aliases we have set
LOGGED = "models:/"  # a version's source: this and the logged model's id
RESERVED_ALIAS = re.compile(rf"latest|{BEST}|v\d+")  # mlflow's, and ours


@dataclass(frozen=True)
class Candidate:
    """An arm's final model, as results/ has it.

    Attributes:
        params: that it was trained with.
        weights: the checkpoint of the last milestone.
        headline: the score that arms are compared by.
        score: of the first seed.
        scores: of all seeds that there are.
        num_seeds: how many there should be.
    """

    key: ArmKey
    params: Params
    weights: Path
    headline: Headline
    score: float
    scores: list[float]
    num_seeds: int

    @property
    def mean_score(self) -> float:
        """Over the seeds."""
        return sum(self.scores) / len(self.scores)

    @property
    def digest(self) -> str:
        """What makes it this arm's model, and draw what it draws."""
        weights = file_sha256(self.weights)
        return hashlib.sha256(f"{self.key.arm} {self.key.fingerprint} {weights}".encode()).hexdigest()

    @property
    def tags(self) -> dict[str, str]:
        """What the version shows."""
        return {
            "arm": self.key.arm,
            "seed": str(self.key.seed),
            self.headline.key: f"{self.score:.6g}",
            f"mean_{self.headline.key}": f"{self.mean_score:.6g}",
            "num_seeds": str(len(self.scores)),
        }


def publish_models(store: Store, event: dict[str, Any]) -> None:
    """What the sender does for the report: versions and aliases as results/ has the arms.

    Args:
        store: where the registry is.
        event: what `publish_report` has written.

    Raises:
        ValueError: params or a file of the results can't be read.
    """
    base, name = Path(event["cwd"]), event["experiment"]
    found = [_candidate(entry, event["num_seeds"], base) for entry in event["models"]]
    candidates = [candidate for candidate in found if candidate is not None]
    if candidates:
        _ensure_registered(store, name)
        versions = {candidate.key.arm: _ensure_version(store, candidate, event["time_ms"]) for candidate in candidates}
        _set_aliases(store, name, _aliases(candidates, versions))


def _candidate(entry: dict[str, Any], num_seeds: int, base: Path) -> Candidate | None:
    """The model of an arm; None where its weights or its score are not there."""
    key, files = ArmKey(**entry["arm"]), {seed: paths.metrics(entry["arm"]["arm"], seed) for seed in entry["seeds"]}
    milestones = {seed: read_json(base / file).get("milestones", {}) for seed, file in files.items()}
    last = max(milestones[key.seed], default=None)
    if last is None:
        return None
    finals = {seed: flat_scores(of_seed.get(last, {})) for seed, of_seed in milestones.items()}
    headline = headline_of(finals[key.seed])
    scores = {seed: finite(final.get(headline.key)) for seed, final in finals.items()}
    weights, score = base / paths.finetune(key.arm, key.seed) / f"milestone-{last}.safetensors", scores[key.seed]
    if score is None or not weights.is_file():
        return None
    known = [value for value in scores.values() if value is not None]
    return Candidate(key, parse_params(entry["params"]), weights, headline, score, known, num_seeds)


def _ensure_registered(store: Store, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        store.client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        about = f"The final models of experiment {name}: predict(DataFrame(seed, num_images)) draws images."
        store.client.create_registered_model(name, description=about)


def _ensure_version(store: Store, candidate: Candidate, time_ms: int) -> str:
    """The version that is this model, made where need be, and noted on the arm's run."""
    name, digest = candidate.key.experiment, candidate.digest
    with store.lock():
        run_id = store.run_of(candidate.key, time_ms)
    known = [version for version in _versions(store, name) if version.tags.get(DIGEST_TAG) == digest]
    version = known[0] if known else _new_version(store, candidate, digest, run_id)
    for key, value in candidate.tags.items():
        if version.tags.get(key) != value:
            store.client.set_model_version_tag(name, version.version, key, value)
    _note_output(store, run_id, str(version.source).removeprefix(LOGGED))
    return str(version.version)


def _versions(store: Store, name: str) -> list[ModelVersion]:
    return list(store.client.search_model_versions(f"name = '{name}'"))


def _new_version(store: Store, candidate: Candidate, digest: str, run_id: str) -> ModelVersion:
    model = _ensure_logged(store, candidate, digest, run_id)
    source, tags = LOGGED + model.model_id, {**candidate.tags, DIGEST_TAG: digest}
    return store.client.create_model_version(candidate.key.experiment, source, run_id, tags, model_id=model.model_id)


def _ensure_logged(store: Store, candidate: Candidate, digest: str, run_id: str) -> LoggedModel:
    """The model with its files; what a killed sender has left half is not used."""
    client, experiment_id = store.client, store.experiment(candidate.key.experiment)
    for model in client.search_logged_models([experiment_id], f"tags.`{DIGEST_TAG}` = '{digest}'"):
        if str(model.status) == "READY":
            return model
        client.delete_logged_model(model.model_id)
    tags = {**candidate.tags, DIGEST_TAG: digest}
    made = client.create_logged_model(experiment_id, candidate.key.run_name, run_id, tags)
    with tempfile.TemporaryDirectory() as place:
        client.log_model_artifacts(made.model_id, str(_save(Path(place), candidate)))
    return client.finalize_logged_model(made.model_id, "READY")


def _save(place: Path, candidate: Candidate) -> Path:
    """Write the model on this machine: what goes wrong here would go wrong again."""
    try:
        return save_model(place, candidate.params, candidate.weights)
    except Exception as error:
        raise ValueError(f"no model could be made of {candidate.weights}: {error}") from error


def _note_output(store: Store, run_id: str, model_id: str) -> None:
    from mlflow.entities import LoggedModelOutput

    outputs = store.client.get_run(run_id).outputs
    if outputs is None or model_id not in {output.model_id for output in outputs.model_outputs}:
        store.client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])


def _aliases(candidates: list[Candidate], versions: dict[str, str]) -> dict[str, str]:
    wanted = {arm: version for arm, version in versions.items() if not RESERVED_ALIAS.fullmatch(arm)}
    complete = [candidate for candidate in candidates if len(candidate.scores) == candidate.num_seeds]
    if len({candidate.headline for candidate in complete}) != 1:
        return wanted  # none, or scores that do not compare
    best = min(complete, key=lambda candidate: candidate.mean_score)
    return {**wanted, BEST: versions[best.key.arm]}


def _set_aliases(store: Store, name: str, wanted: dict[str, str]) -> None:
    """Set ours and delete those of ours that are no more; other people's stay."""
    model = store.client.get_registered_model(name)
    known = {alias: str(version) for alias, version in model.aliases.items()}
    ours = set(json.loads(model.tags.get(ALIASES_TAG, "[]")))
    for alias, version in wanted.items():
        if known.get(alias) != version:
            store.client.set_registered_model_alias(name, alias, version)
    for alias in (ours & set(known)) - set(wanted):
        store.client.delete_registered_model_alias(name, alias)
    if ours != set(wanted):
        store.client.set_registered_model_tag(name, ALIASES_TAG, json.dumps(sorted(wanted)))
