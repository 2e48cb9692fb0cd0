"""Reports on paper: printed by a headless browser, and read back page by page."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.exports import Checkpoints
from support.program import PROCESS_TIMEOUT
from support.reports import browse, needs_browser, verification

import quarkconv
from quarkconv.report.inspection import inspection_report
from quarkconv.report.verification import verification_report
from quarkconv.verify.results import Problem

pytestmark = [
    needs_browser,
    pytest.mark.skipif(shutil.which("pdftotext") is None, reason="needs pdftotext and pdftoppm (poppler-utils)"),
]
LAYERS, WORST = 62, 50


def print_pages(folder: Path, html: str, scheme: str = "light") -> list[list[str]]:
    """The pages as lines of text, laid out as they are on paper."""
    pdf = folder / "report.pdf"
    browse(folder, html, "--no-pdf-header-footer", f"--print-to-pdf={pdf}", scheme=scheme)
    command = ["pdftotext", "-layout", str(pdf), "-"]
    text = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=PROCESS_TIMEOUT, check=True).stdout
    return [[line.strip() for line in page.splitlines() if line.strip()] for page in text.split("\f")[:-1]]


def with_rows(pages: list[list[str]], row: str) -> list[tuple[list[str], list[str]]]:
    """The pages that have such rows of a table, and the rows on each."""
    found = [(page, [line for line in page if re.fullmatch(row, line)]) for page in pages]
    return [(page, rows) for page, rows in found if rows]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """A large model's verification, printed."""
    problems = tuple(
        Problem("bytes", layer, f"model.layers.{layer}.block_sparse_moe.experts.w13", "The bytes differ " * 6, 2)
        for layer in range(5)
    )
    report = verification_report(verification(LAYERS, 256, problems), "quarkconv verify")
    return print_pages(tmp_path_factory.mktemp("paper"), report)


def test_the_verdict_comes_first_and_pages_are_numbered(pages: list[list[str]]) -> None:
    assert "Not verified: 5 problems" in pages[0][1]
    assert [page[-1].replace(" ", "") for page in pages] == [
        f"{number}/{len(pages)}" for number in range(1, len(pages) + 1)
    ]
    assert len(pages) <= 9


def test_no_column_is_cut_off_and_heads_are_repeated(pages: list[list[str]]) -> None:
    layers = with_rows(pages, r"\d+ +64 .* ✓")
    assert [int(row.split()[0]) for _, rows in layers for row in rows] == list(range(LAYERS))
    assert len(layers) > 1
    for page, _ in layers:
        assert any(line.startswith("layer") and line.endswith("result") for line in page)
    worst = with_rows(pages, r"\d+ +(gate|up|down) +\d+ +0\.\d+ +40 +0")
    assert sum(len(rows) for _, rows in worst) == WORST
    for page, _ in worst:
        assert any(line.startswith("layer") and line.endswith("clipped share") for line in page)


def test_nothing_announces_what_is_on_the_next_page(pages: list[list[str]]) -> None:
    announce = {"What was checked", "Problems", "Numbers", "Experts", "Worst weights", "Environment"}
    for page in pages:
        last = page[-2]
        assert last not in announce
        assert not last.startswith(("layer ", "stage ", "what ")), page  # the head of a table
        assert not re.match("(Signal|Distance|Weight|Range|Distribution|Load|Layers)", last), page  # a caption


def test_charts_are_whole(pages: list[list[str]]) -> None:
    everything = "\n".join(line for page in pages for line in page)
    for words in ("Weight error of each expert", "Load of each expert"):
        (page,) = (page for page in pages if any(line.startswith(words) for line in page))
        assert page.count("expert") >= 1  # the label below the axis
    assert "log10(scale)" in everything
    assert "with outliers" in everything


def test_paper_is_white_for_who_prefers_dark_too(tmp_path: Path) -> None:
    from PIL import Image

    print_pages(tmp_path, verification_report(verification(3, 8), "x"), "dark")
    command = ["pdftoppm", "-r", "40", "-png", "-singlefile", str(tmp_path / "report.pdf"), str(tmp_path / "page")]
    subprocess.run(command, check=True, timeout=PROCESS_TIMEOUT)
    with Image.open(tmp_path / "page.png") as image:
        values = image.convert("L").tobytes()
    assert values[0] == 255
    assert sum(value > 250 for value in values) > 0.8 * len(values)
    assert min(values) < 80


def test_an_inspection_prints_on_paper(tmp_path: Path, checkpoints: Checkpoints) -> None:
    inspection = quarkconv.inspect_checkpoint(checkpoints("qwen3_moe-quark0.13-f2f"))
    pages = print_pages(tmp_path, inspection_report(inspection, "x"))
    engines = with_rows(pages, r"(vllm|sglang|transformers|quark) .*")
    cells = [row.split() for _, rows in engines for row in rows]
    names = [name for name, *others in cells if len(others) > 1]  # not a note that goes on in the next line
    assert names.count("transformers") == sum(fact.engine == "transformers" for fact in inspection.engines)
    for page, _ in engines:
        assert any(line.startswith("engine ") and line.endswith("note") for line in page)
