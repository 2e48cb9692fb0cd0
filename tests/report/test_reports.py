"""Reports: one file, nothing fetched, every chart with words; looked at in a headless browser where there is one."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.exports import Checkpoints
from support.model import Model
from support.program import PROCESS_TIMEOUT, run_cli, utf8_environment
from support.reports import browse, needs_browser, verification

import quarkconv
from quarkconv.report.inspection import inspection_report
from quarkconv.report.page import table
from quarkconv.report.verification import verification_report
from quarkconv.verify.layer_results import Distance
from quarkconv.verify.results import BytesResult, Problem

pytestmark = pytest.mark.long(25)

Capture = pytest.CaptureFixture[str]


class Page(HTMLParser):
    """What a page consists of."""

    VOID = frozenset({"meta", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module", params=[(3, 8), (62, 256)], ids=["3x8", "62x256"])
def report(request: pytest.FixtureRequest) -> str:
    return verification_report(verification(*request.param), "quarkconv verify 'a b'")


def test_a_report_is_one_sound_file_that_fetches_nothing(report: str) -> None:
    page = Page(report)
    assert page.open == []
    assert not page.all("link")
    assert not [found for found in page.all("script") if "src" in found]
    places = [value for _, attributes in page.tags for name, value in attributes.items()
              if name in ("src", "href", "xlink:href")]  # fmt: skip
    assert all(value is not None and value.startswith(("#", "data:")) for value in places)
    assert not re.findall(r"url\((?!#)", report)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert len(report) < 2_000_000


def test_charts_have_words_and_can_be_reached(report: str) -> None:
    page = Page(report)
    figures, drawings = page.all("figure"), page.all("svg")
    assert len(figures) == len(drawings) == 6
    assert all(figure["tabindex"] == "0" for figure in figures)
    assert all(drawing["role"] == "img" and len(drawing["aria-label"] or "") > 20 for drawing in drawings)
    assert "currentColor" in report
    assert "#0102" not in report  # every colour is one of the page
    assert "prefers-color-scheme: dark" in report
    assert "@media print" in report
    assert page.all("button")


def test_names_are_text(report: str) -> None:
    assert "org/&lt;model&gt; &amp; more" in report
    assert "<model>" not in report


def test_a_report_is_the_same_twice_but_for_numbers_of_figures() -> None:
    one, other = (verification_report(verification(2, 4), "x") for _ in range(2))
    plain = [re.sub(r"\bc\d+-|[-\d]+ \d\d:\d\d UTC", "", text) for text in (one, other)]
    assert plain[0] == plain[1]


def test_problems_and_unchecked_stages_are_shown() -> None:
    problem = Problem("bytes", 3, "model.layers.3.x", "The bytes differ", 2)
    bad = dataclasses.replace(verification(1, 2, (problem,)), bytes=BytesResult(skipped="there is no manifest"))
    text = verification_report(bad, "x")
    assert "Not verified: 1 problem; not checked: bytes" in text
    assert "The bytes differ" in text
    assert "there is no manifest" in text


def test_a_report_of_the_structure_alone_has_no_figures(checkpoints: Checkpoints) -> None:
    result = quarkconv.verify_checkpoint(checkpoints("qwen3_moe-quark0.13-f2f"), device="cpu", stages=[])
    assert "<svg" not in verification_report(result, "x")


def test_an_inspection_has_a_report(tmp_path: Path, capsys: Capture, checkpoints: Checkpoints) -> None:
    code, _, _ = run_cli(capsys, "inspect", checkpoints("qwen3_moe-quark0.13-f2f"), "--report", tmp_path / "r.html")
    assert code == 0
    text = (tmp_path / "r.html").read_text("utf-8")
    assert Page(text).open == []
    assert "routed experts" in text
    assert text.count("<svg") == 2
    broken = Model()
    broken.remove("model.layers.1.mlp.experts.2.")
    inspection = quarkconv.inspect_checkpoint(broken.write(tmp_path / "broken"))
    assert inspection.findings[0].message in inspection_report(inspection, "x").replace("&#x27;", "'")


def test_a_report_that_cannot_be_written(tmp_path: Path, capsys: Capture, checkpoints: Checkpoints) -> None:
    target = tmp_path / "no" / "r.html"
    assert run_cli(capsys, "inspect", checkpoints("qwen3_moe-quark0.13-f2f"), "--report", target)[0] == 5


def test_a_report_without_matplotlib_is_refused(
    tmp_path: Path, capsys: Capture, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quarkconv.cli.reports.find_spec", lambda _: None)
    code, _, err = run_cli(capsys, "inspect", checkpoints("qwen3_moe-quark0.13-f2f"), "--report", tmp_path / "r.html")
    assert code == 2
    assert "pip install 'matplotlib>=3.9'" in err


def test_tables_sort_numbers_as_numbers() -> None:
    text = table(("name", "count"), [("b", 10), ("a", 9.5), ("c", None)], sortable=True, label="x")
    assert 'data-value="9.5"' in text
    assert text.count("<button") == 2


def test_columns_without_a_value_are_left_out() -> None:
    text = table(("name", "count", "why"), [("a", None, ""), ("b", 0, None)], label="x")
    assert "count" in text
    assert "why" not in text


def test_a_layer_that_equals_the_exact_arithmetic_needs_no_chart() -> None:
    plain = verification(2, 4)
    layers = tuple(dataclasses.replace(one, exact=Distance(0.0, 1.0, None, 0.0, 1e-3)) for one in plain.numbers.layers)
    text = verification_report(
        dataclasses.replace(plain, numbers=dataclasses.replace(plain.numbers, layers=layers)), "x"
    )
    assert text.count("<svg") == 5
    assert "Equal to exact integer arithmetic in every layer." in text


SORT = """
<script>
addEventListener("load", () => {
  const table = document.querySelector("table.sortable"), button = table.querySelectorAll("th button")[2];
  button.focus(); button.click();
  const values = [...table.tBodies[0].rows].map((row) => Number(row.cells[2].dataset.value));
  const down = values.every((value, at) => at === 0 || values[at - 1] >= value);
  document.title = `${down} ${document.activeElement === button} ${document.querySelectorAll("svg").length}`;
});
</script>
"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_and_sorts_a_report(report: str, tmp_path: Path, scheme: str) -> None:
    shown = browse(tmp_path, report.replace("</body>", f"{SORT}</body>"), "--dump-dom", scheme=scheme)
    assert "<title>true true 6</title>" in shown
    picture = tmp_path / "picture.png"
    browse(tmp_path, report, "--hide-scrollbars", "--window-size=1000,2000", f"--screenshot={picture}", scheme=scheme)
    pixels = _pixels(picture)
    background = pixels[0]
    assert (sum(background) > 600) == (scheme == "light")
    assert len(set(pixels)) > 50  # charts are there


NARROW = """
<script>
addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter((one) => one.scrollWidth > one.clientWidth
    && getComputedStyle(one).overflowX === "auto");
  const page = document.documentElement, chart = document.querySelector("figure svg").getBoundingClientRect();
  document.title = [page.scrollWidth <= innerWidth, wide.length > 0, wide.every((one) => one.tabIndex === 0),
    chart.width > innerWidth].join(" ");
});
</script>
"""


@needs_browser
def test_on_a_narrow_screen_charts_stay_legible_and_the_keyboard_reaches_what_scrolls(
    report: str, tmp_path: Path
) -> None:
    # A window of Chromium is not narrower than this.
    shown = browse(tmp_path, report.replace("</body>", f"{NARROW}</body>"), "--dump-dom", "--window-size=500,800")
    assert "<title>true true true true</title>" in shown


def _pixels(picture: Path) -> list[tuple[int, ...]]:
    from PIL import Image

    with Image.open(picture) as image:
        small = image.convert("RGB").resize((200, 400))
        return [small.getpixel((x, y)) for y in range(400) for x in range(200)]  # type: ignore[misc]


def test_no_chart_library_is_imported_without_a_report(checkpoints: Checkpoints) -> None:
    code = (
        "import sys\nfrom quarkconv.cli.main import main\n"
        "try:\n    main(['inspect', sys.argv[1]])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "assert 'matplotlib' not in sys.modules and 'huggingface_hub' not in sys.modules"
    )
    model = str(checkpoints("qwen3_moe-quark0.13-f2f"))
    command, environment = [sys.executable, "-c", code, model], utf8_environment()
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=PROCESS_TIMEOUT)
