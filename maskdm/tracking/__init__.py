"""MLflow: what a stage logs while it works, and the arm runs that its UI compares.

The only code that imports mlflow, and only where `params.tracking.enabled`; nothing here can fail a stage.
`worker` runs every call in one thread, `store` opens the database and finds the runs, `stage_runs` is what a
stage uses, `arm_content` says what an arm run carries, `publishing` makes it so, `views` are the URLs.
"""

from maskdm.tracking.publishing import publish_arm
from maskdm.tracking.stage_runs import StageRun, stage_run
from maskdm.tracking.store import store_uri
from maskdm.tracking.views import chart_url, compare_url

__all__ = ["StageRun", "chart_url", "compare_url", "publish_arm", "stage_run", "store_uri"]
