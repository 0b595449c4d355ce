"""The final models of the arms in MLflow's registry: one version for every arm, under the experiment's name.

A version holds the last averaged weights of the first seed. Equal weights and params make no new version. Every arm has
an alias of its name; `best` is the arm with the best mean of the headline's score over all seeds, FID as a rule.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskdm.base.checksums import short_hash
from maskdm.config import Run, paths
from maskdm.config.jobs import Jobs
from maskdm.config.stamps import read_stamp
from maskdm.scoring.headline import Headline, headline_of
from maskdm.tracking.content import FINAL, Content
from maskdm.tracking.logged_model import save_model
from maskdm.tracking.store import Store

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

BEST = "best"
DIGEST_TAG = "maskdm.model"
ALIASES_TAG = "maskdm.aliases"  # of the registered model: the aliases that we have set
LOGGED = "models:/"  # a version's source: this and the id of the logged model
RESERVED_ALIAS = re.compile(rf"latest|{BEST}|v\d+")  # MLflow's, and ours


@dataclass(frozen=True)
class Model:
    """The final model of an arm.

    Attributes:
        run: its first seed.
        run_id: of that seed's run in MLflow.
        weights: the checkpoint of the last milestone.
        weights_sha256: its hash.
        headline: the score that arms are compared by.
        scores: by seed.
    """

    run: Run
    run_id: str
    weights: Path
    weights_sha256: str
    headline: Headline
    scores: dict[int, float]

    @property
    def mean_score(self) -> float:
        """Over the seeds."""
        return sum(self.scores.values()) / len(self.scores)

    @property
    def digest(self) -> str:
        """Of what it draws, and of whose model it is."""
        return short_hash(self.run.arm, self.run.fingerprint(), self.weights_sha256)

    @property
    def tags(self) -> dict[str, str]:
        """What the version shows."""
        key = self.headline.key
        return {
            "arm": self.run.arm,
            "seed": str(self.run.seed),
            key: f"{self.scores[self.run.seed]:.6g}",
            f"mean_{key}": f"{self.mean_score:.6g}",
            "num_seeds": str(len(self.scores)),
            DIGEST_TAG: self.digest,
        }


def publish_models(store: Store, jobs: Jobs, arms: list[tuple[Content, str]]) -> None:
    """Make versions and aliases what results/ says.

    Args:
        store: where the registry is.
        jobs: of the experiment.
        arms: every arm and seed that is scored, with the id of its run.
    """
    name, seeds = jobs.params.name, jobs.params.seeds
    models = [model for arm in jobs.params.arms if (model := _model_of(jobs, arm, arms)) is not None]
    if not models:
        return
    _ensure_registered(store, name)
    versions = {model.run.arm: _ensure_version(store, name, model) for model in models}
    wanted = {arm: version for arm, version in versions.items() if not RESERVED_ALIAS.fullmatch(arm)}
    complete = [model for model in models if len(model.scores) == len(seeds)]
    if len({model.headline for model in complete}) == 1:  # else there are none, or their scores do not compare
        best = min(complete, key=lambda model: model.mean_score)
        wanted[BEST] = versions[best.run.arm]
    _set_aliases(store, name, wanted)


def _model_of(jobs: Jobs, arm: str, arms: list[tuple[Content, str]]) -> Model | None:
    """The model of an arm; None where its first seed is not scored."""
    of_arm = {int(content.slot["seed"]): (content, run_id) for content, run_id in arms if content.slot["arm"] == arm}
    first = jobs.params.seeds[0]
    if first not in of_arm:
        return None
    content, run_id = of_arm[first]
    run, finetuned = jobs.run_of(arm, first), jobs.find("finetune", arm, first).output
    file, stamp = paths.milestone_file(run.milestones[-1][0]), read_stamp(finetuned)
    headline = headline_of({key for key, _ in content.points})
    at = (headline.key, FINAL)
    scores = {seed: content.points[at] for seed, (content, _) in of_arm.items() if at in content.points}
    if first not in scores or stamp is None or file not in stamp.files:
        return None
    return Model(run, run_id, finetuned / file, stamp.files[file]["sha256"], headline, scores)


def _ensure_registered(store: Store, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        store.client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        about = f"The final models of experiment {name}: predict(DataFrame(seed, num_images)) draws images."
        store.client.create_registered_model(name, description=about)


def _ensure_version(store: Store, name: str, model: Model) -> str:
    """The version that is this model, created where it does not exist, and named as an output of the arm's run."""
    with store.locked():
        versions = store.client.search_model_versions(f"name = '{name}'")
        known = [version for version in versions if version.tags.get(DIGEST_TAG) == model.digest]
        if known:
            version = known[0]
        else:
            logged = _ensure_logged(store, model)
            source = LOGGED + logged.model_id
            version = store.client.create_model_version(
                name, source, model.run_id, model.tags, model_id=logged.model_id
            )
    for key, value in model.tags.items():
        if version.tags.get(key) != value:
            store.client.set_model_version_tag(name, version.version, key, value)
    _note_output(store, model.run_id, str(version.source).removeprefix(LOGGED))
    return str(version.version)


def _ensure_logged(store: Store, model: Model) -> LoggedModel:
    """The model with its files; one that a killed process has left half is made again."""
    client = store.client
    for logged in client.search_logged_models([store.experiment_id], f"tags.`{DIGEST_TAG}` = '{model.digest}'"):
        if str(logged.status) == "READY":
            return logged
        client.delete_logged_model(logged.model_id)
    name = f"{model.run.arm}-seed-{model.run.seed}"
    made = client.create_logged_model(store.experiment_id, name, model.run_id, model.tags)
    with tempfile.TemporaryDirectory() as place:
        client.log_model_artifacts(made.model_id, str(save_model(Path(place), model.run.params, model.weights)))
    return client.finalize_logged_model(made.model_id, "READY")


def _note_output(store: Store, run_id: str, model_id: str) -> None:
    from mlflow.entities import LoggedModelOutput

    outputs: Any = store.client.get_run(run_id).outputs
    if outputs is None or model_id not in {output.model_id for output in outputs.model_outputs}:
        store.client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])


def _set_aliases(store: Store, name: str, wanted: dict[str, str]) -> None:
    """Set our aliases, and delete those of ours that are not wanted any more; other people's stay."""
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
