"""The comparison of arms in MLflow's real UI, in headless Chromium: its saved views are an undocumented format."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import psutil
import pytest
import yaml

from maskdm.base.errors import UserError
from maskdm.config import Params, load_params
from maskdm.config.jobs import Jobs
from maskdm.tracking.publishing import track
from maskdm.tracking.store import Store
from maskdm.tracking.ui import open_ui, urls
from tests.conftest import TINY
from tests.tracking.tracked import (
    PARAMS,
    free_port,
    run_python,
    run_ui,
    stamp,
    write_data,
    write_results,
    write_verdicts,
)

# SQLAlchemy's pool closes its connections only when the process ends; Python 3.13 notices.
pytestmark = [pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"), pytest.mark.workflow]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# No sandbox: it needs privileges that a container does not give. The rest keeps Chromium off the network.
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-default-apps --window-size=1800,2400"
)
PATIENCE_SECONDS = 60.0
FIDS = {"scratch": (20.5, 21.5), "patch-m50": (18.0, 19.0), "block2-m75": (30.0, 32.0)}


class Page(HTMLParser):
    """What a rendered page shows.

    Attributes:
        cells: of the table, the text by (row, column).
        charts: of each chart, its texts, and the lines as colour and number of points.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.cells: dict[tuple[str, str], str] = {}
        self.charts: list[tuple[list[str], set[tuple[str, int]]]] = []
        self._row = self._column = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        has = {name: value or "" for name, value in attrs}
        self._row, self._column = has.get("row-id", self._row), has.get("col-id", self._column)
        if has.get("data-testid") == "experiment-view-compare-runs-card":
            self.charts.append(([], set()))
        if has.get("class") == "js-line" and self.charts:
            style = dict(re.findall(r"([\w-]+): ([^;]+)", has["style"]))
            if style.get("stroke-opacity", "1") != "0":  # the edges of a band are invisible lines
                self.charts[-1][1].add((style["stroke"], len(re.findall("[ML]", has["d"]))))

    def handle_data(self, data: str) -> None:
        at = self._row, self._column
        self.cells[at] = self.cells.get(at, "") + data
        if self.charts:
            self.charts[-1][0].append(data)

    def column(self, name: str) -> dict[str, str]:
        """The texts of a column by row."""
        return {row: text for (row, column), text in self.cells.items() if column == name and row}

    def chart(self, title: str) -> tuple[list[str], set[tuple[str, int]]]:
        """Texts and lines of the chart of that title; empty where there is none."""
        return next((chart for chart in self.charts if chart[0][:1] == [title]), ([], set()))


@pytest.fixture
def params(project: Path, store: Store) -> Params:
    """The arms of the tiny experiment with two seeds and their values as given, in the store."""
    content = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    content |= {"seeds": [0, 1], "arms": {arm: content["arms"][arm] for arm in FIDS}}
    content["tuning"]["trials"] = {}
    (project / "params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    write_data()
    for arm, fids in FIDS.items():
        for seed, fid in enumerate(fids):
            write_results(arm, seed, fid)
    write_verdicts(scratch=1.0, patch_m50=0.61, block2_m75=None)
    params = load_params()
    stamp(params)
    track(Jobs(params))
    return params


@pytest.fixture
def ui(params: Params, project: Path) -> Iterator[str]:
    """The address of `maskdm ui` on that store."""
    port = free_port()
    with run_ui(project, port):
        yield f"http://127.0.0.1:{port}"


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
def test_the_ui_shows_every_arm_with_its_fid_and_draws_a_line_for_each(params: Params, ui: str, tmp_path: Path) -> None:
    addresses = urls(params, ui)
    table = render(addresses["arms, the best first"], tmp_path, lambda page: len(page.column("metrics.`fid`")) >= 3)
    means = {f"param.arm.{arm}": sum(fids) / len(fids) for arm, fids in FIDS.items()}
    shown = {
        row: float(text.split()[0].removesuffix("(average)")) for row, text in table.column("metrics.`fid`").items()
    }
    assert shown == pytest.approx(means)  # a row per arm, its seeds folded
    assert list(shown) == sorted(means, key=means.__getitem__)  # best first
    ratios = {
        row: text.replace("(average)", "").strip() for row, text in table.column("metrics.`compute_ratio`").items()
    }
    assert ratios == dict(zip(means, ("1", "0.61", "-"), strict=True))

    charts = render(addresses["charts of the arms"], tmp_path, lambda page: len(page.chart("fid")[1]) >= 3)
    texts, lines = charts.chart("fid")
    assert "flops" in texts  # the abscissa
    assert {f"{arm} (fid)" for arm in FIDS} <= set(texts)
    assert len({colour for colour, _ in lines}) == len(FIDS)
    assert {points for _, points in lines} == {2}  # the milestones
    assert len(charts.chart("finetune/loss")[1]) == len(FIDS)
    assert len(charts.chart("pretrain/loss")[1]) == len(FIDS) - 1  # scratch has none


def render(url: str, folder: Path, is_ready: Callable[[Page], bool]) -> Page:
    """What Chromium shows of a page that fetches its content; on a busy machine the first look may come too early."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        page = Page(_dump(url, folder / "profile"))
        if is_ready(page) or time.monotonic() > deadline:
            return page


def _dump(url: str, profile: Path) -> str:
    waiting = ["--run-all-compositor-stages-before-draw", "--virtual-time-budget=30000", "--dump-dom"]
    command = [str(CHROMIUM), *OPTIONS.split(), f"--user-data-dir={profile}", *waiting, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_ui_says_what_is_missing(project: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="--port"):
            open_ui(PARAMS, taken.getsockname()[1])
    with pytest.raises(UserError, match="no results of experiment 'tracking-test' yet: run `dvc repro` first"):
        open_ui(PARAMS, free_port())


def test_the_ui_answers_and_leaves_no_process(store: Store) -> None:
    write_results()
    stamp(PARAMS)
    port = free_port()
    process = run_python('from maskdm.cli import main\nsys.exit(main(["ui", "--port", sys.argv[2]]))', str(port))
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline() for _ in range(3)]
        server = psutil.Process(process.pid).children(recursive=True)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            assert answer.status == 200
    finally:
        process.terminate()
        process.communicate(timeout=60)
    page = f"127.0.0.1:{port}/#/experiments/{store.experiment_id}/runs?viewStateShareKey=arms&"
    assert page in lines[0] and lines[2] == "Ctrl-C stops it.\n"
    assert server and not any(helper.is_running() for helper in server)
