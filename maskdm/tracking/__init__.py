"""MLflow: what a stage logs while it works, and the arm runs that its UI compares.

The only code that imports mlflow, and only where `params.tracking.enabled`; nothing here can fail a stage.
A stage never imports mlflow itself, which costs seconds of CPU: it appends events to a `spool` on disk
(`stage_runs`, `publishing.publish_arm`), and one `sender` process per project brings them to the server or database
(`background` starts it and waits for it). There `delivery` says what an event does, `store` opens the database and
finds the runs, `continued` knows what a run already has that a resumed stage goes on with, `arm_content`,
`trial_content` and `dataset` say what a run carries, `publishing` makes it so, and `registry` does it for the final
models (`logged_model`, `drawing_model`). `saved_view` is how MLflow's UI shows them, `views` are its URLs.
"""

from maskdm.tracking.arm_content import flat
from maskdm.tracking.background import flush, sync, unsent_note
from maskdm.tracking.publishing import publish_arm, publish_report
from maskdm.tracking.stage_runs import stage_run
from maskdm.tracking.store import store_uri
from maskdm.tracking.trial_content import trial_params
from maskdm.tracking.views import chart_url, compare_url, trials_url

__all__ = [
    "chart_url",
    "compare_url",
    "flat",
    "flush",
    "publish_arm",
    "publish_report",
    "stage_run",
    "store_uri",
    "sync",
    "trial_params",
    "trials_url",
    "unsent_note",
]
