"""MLflow: a view of results/, and what a long stage logs while it works. The only code that imports mlflow.

    results/, .work/ ──content.contents──▶ what every run carries ──store.Store.publish──▶ MLflow

`publishing.track` does this for everything; a second time it changes nothing. It is called by the stage `report`, at
the end of every stage that worked for more than a minute (`live`), by `maskdm track` and by `maskdm ui`. A run is found
by the id in the record of its stage, so that resumed stages and clones have the same run. `registry` does the same for
the final models (`logged_model`, `drawing_model`). `saved_view` is how MLflow's UI shows the runs.
"""
