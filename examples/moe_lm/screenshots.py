"""Pictures of what a user sees of runs: TensorBoard's pages and the report, in a headless browser.

``python -m examples.moe_lm.screenshots runs/muon runs/adamw --out docs/pictures``
"""

from __future__ import annotations

import argparse
import base64
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

if not __package__:  # run as a file: the repository's root makes `examples` importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.moe_lm.browser import Browser
from lightning_muon.cli import main as lightning_muon
from lightning_muon.reporting.runs import read_runs

_SECONDS = 60.0
_IMAGES_HEIGHT = 1400
_LOOK_EVERY, _ALIKE_IN_A_ROW = 0.7, 3

# TensorBoard's pages are trees of shadow roots, which selectors do not enter.
_HELPERS = """
globalThis.all = (selector, root = document) => [
  ...root.querySelectorAll(selector),
  ...[...root.querySelectorAll("*")].flatMap((one) => one.shadowRoot ? all(selector, one.shadowRoot) : []),
];
globalThis.click = (selector, text) => {
  const found = all(selector).filter((one) => one.textContent.includes(text));
  found.forEach((one) => one.click());
  return found.length;
};
globalThis.isBusy = () => all("paper-spinner-lite[active], mat-spinner, .spinner").some((one) => one.offsetParent);
true
"""
# Its settings: no pane of them, no table below each chart, cards wide enough for three in a row.
_SETTINGS = """
localStorage.setItem("_tb_global_settings", JSON.stringify({
  timeSeriesSettingsPaneOpened: false, stepSelectorEnabled: false, scalarSmoothing: 0, timeSeriesCardMinWidth: 335,
  darkMode: false, sideBarWidthInPercent: 14,
}))
"""
_SCALARS = r"^muon/(update_rms|weight_svd_entropy|momentum_q50|ns_fail_frac)/_mean|^(train|val)/loss"


def main(arguments: list[str] | None = None) -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="logs of runs, at any depth below")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder for the PNG files")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        # under its own name, so that no picture shows where the runs are
        logs = Path(folder, "runs")
        found = {logs / run.label: run.folder for run in read_runs(options.runs).runs}
        for copy, original in found.items():
            shutil.copytree(original, copy, ignore=shutil.ignore_patterns("checkpoints"))
        pictures = [*tensorboard_pictures(logs, options.out), *report_pictures(list(found), options.out)]
    for picture in pictures:
        print(f"{picture}  {picture.stat().st_size / 1024:.0f} KiB")


def tensorboard_pictures(logs: Path, out: Path) -> Iterator[Path]:
    """The pages for scalars, custom scalars and images."""
    with tensorboard(logs) as url, Browser(1280, 900) as browser:
        browser.open(url)
        settle(browser, "document.querySelector('tb-webapp')")
        browser.run(_SETTINGS)
        open_page(browser, f"{url}?tagFilter={_SCALARS}&smoothing=0#timeseries", "all('line-chart').length")
        yield browser.screenshot(out / "tensorboard_scalars.png")
        open_page(browser, f"{url}#custom_scalars&_smoothingWeight=0", "all('vz-line-chart2').length")
        yield browser.screenshot(out / "tensorboard_custom_scalars.png")
        browser.run("all('paper-icon-button[title*=\"log scale\"]').forEach((one) => one.click())")
        browser.run("all('.heading').find((one) => one.textContent.includes('Spectrum')).scrollIntoView()")
        settle(browser, "!isBusy()")
        yield browser.screenshot(out / "tensorboard_spectra.png")
        open_page(browser, f"{url}#images", "all('img[src*=individualImage]').length")
        browser.run("click('paper-checkbox', 'actual image size')")
        browser.resize(_IMAGES_HEIGHT)
        settle(browser, "!isBusy()")
        yield browser.screenshot(out / "tensorboard_images.png", height=_IMAGES_HEIGHT)


def report_pictures(runs: Sequence[Path], out: Path) -> Iterator[Path]:
    """The top of the page, and single figures."""
    page = runs[0].with_name("report.html")
    if lightning_muon(["report", *map(str, runs), "-o", str(page)]):
        raise SystemExit("The report could not be written.")
    with Browser(1280, 900) as browser:
        browser.open(page.as_uri())
        settle(browser, "document.documentElement.dataset.drawn === 'true'")
        yield browser.screenshot(out / "report_top.png", height=760)
        figures = {
            "Update RMS": "report_update_rms.png",
            "Spectrum of one matrix": "report_spectrum.png",
            "Directions that Newton–Schulz misses": "report_missed.png",
            "Weight RMS": "report_weight_rms.png",
        }
        for title, name in figures.items():
            box = browser.run(
                f"(() => {{ const found = [...document.querySelectorAll('figure')].find((one) =>"
                f" one.querySelector('h3').textContent === '{title}'); if (!found) return null;"
                " const box = found.getBoundingClientRect(); return [box.top + scrollY, box.height]; })()"
            )
            if box:
                yield browser.screenshot(out / name, top=box[0] - 10, height=box[1] + 20)


@contextmanager
def tensorboard(logs: Path) -> Iterator[str]:
    """TensorBoard on a free port; it ends with the ``with`` block."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logs.name, "--host", "127.0.0.1", "--port", "0"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=logs.parent, stdout=subprocess.DEVNULL, stderr=said)
        try:
            deadline = time.monotonic() + _SECONDS
            while True:
                said.seek(0)
                text = said.read()
                if found := re.search(r"http://127\.0\.0\.1:\d+/", text):
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"TensorBoard has not started:\n{text}")
                time.sleep(0.2)
            yield found[0]
        finally:
            process.terminate()
            process.wait()


def open_page(browser: Browser, url: str, condition: str) -> None:
    """Open one of TensorBoard's pages anew, and wait for it."""
    browser.open("about:blank")
    browser.wait_for("location.href === 'about:blank'")
    browser.open(url)
    browser.wait_for("document.querySelector('tb-webapp') !== null")
    settle(browser, f"{condition} && !isBusy()")


def settle(browser: Browser, condition: str) -> None:
    """Wait until a condition is true and the page has stopped changing."""
    browser.run(_HELPERS)
    browser.wait_for(f"Boolean({condition})")
    deadline, last, alike = time.monotonic() + _SECONDS, b"", 0
    while alike < _ALIKE_IN_A_ROW:
        if time.monotonic() > deadline:
            raise TimeoutError(f"The page has not come to rest in {_SECONDS:.0f} seconds.")
        time.sleep(_LOOK_EVERY)
        now = base64.b64decode(browser.send("Page.captureScreenshot", format="png")["data"])
        alike = alike + 1 if now == last else 0
        last = now


if __name__ == "__main__":
    main()
