"""The report of ``evaluate``: one file, nothing fetched, charts with words, what was given escaped."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from io import StringIO

import pytest
from rich.console import Console

from quarkconv.cli.render.evaluation import render_evaluation
from quarkconv.evaluate.request import Limits
from quarkconv.evaluate.results import Ablation, Evaluation, ExpertError, LayerEvaluation
from quarkconv.evaluate.scores import Divergence, Perplexity
from quarkconv.report.evaluation import evaluation_report


@pytest.fixture
def evaluation() -> Evaluation:
    """Three layers, of which the second has no experts."""
    layers = tuple(
        LayerEvaluation(
            index,
            f"model.layers.{index}",
            drift=0.02 * (index + 1),
            cosine=0.999,
            own=own,
            routing_changed=None if index == 1 else 0.01,
            load=() if index == 1 else (3, 9, 0, 4),
        )
        for index, own in enumerate((0.01, 0.03, 0.02))
    )
    divergence = Divergence(0.0018, 0.0005, 0.03, 0.7, 0.0001, 0.977, 0.0124)
    return Evaluation(
        model="a <b> & c", unquantized="before", scheme="ptpc_int8", tokens_from="text.txt", windows=2, window=8,
        scored=6, device="cpu",
        perplexity={"int8": Perplexity(10.1, 0.2), "dequantized": None, "unquantized": Perplexity(10.0, 0.2)},
        baseline="unquantized", int8=divergence, dequantized=None, layers=layers,
        experts=(ExpertError(0, 3, 17, 0.05),), ablations=(Ablation(1, "model.layers.1", 3, 0.002, -0.1),),
        float_experts=("model.layers.1.mlp.experts",), limits=Limits(max_kl=0.001),
    )  # fmt: skip


class Tags(HTMLParser):
    """The open and all tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_one_sound_file_that_fetches_nothing(evaluation: Evaluation) -> None:
    page = Tags(evaluation_report(evaluation, "quarkconv evaluate 'a <b>'"))
    assert page.open == []
    for tag, attributes in page.found:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), tag


def test_every_chart_of_the_report_is_described_in_words(evaluation: Evaluation) -> None:
    page = Tags(evaluation_report(evaluation, ""))
    labels = [attributes["aria-label"] for tag, attributes in page.found if tag == "svg"]
    assert len(labels) == 4  # perplexity, errors, routing, load
    assert "largest in layer 1" in str(labels[1])
    assert "largest in layer 0, expert 1" in str(labels[3])


def test_the_report_says_what_was_found(evaluation: Evaluation) -> None:
    html = evaluation_report(evaluation, "")
    text = re.sub(r"\s+", " ", re.sub(r"<(style|script).*?</\1>|<svg.*?</svg>|<[^>]+>", " ", html, flags=re.DOTALL))
    assert "a &lt;b&gt; &amp; c" in text
    assert "✗ mean KL divergence 0.0018 exceeds --max-kl 0.001" in text
    assert "1 MoE layer with experts stored in float, evaluated in float: model.layers.1.mlp.experts" in text
    assert "model.layers.1.mlp.experts" in text


def test_a_model_in_floats_has_a_report_without_divergence(evaluation: Evaluation) -> None:
    plain = dataclasses.replace(
        evaluation, scheme=None, int8=None, layers=(), experts=(), ablations=(), float_experts=(), limits=Limits()
    )
    html = evaluation_report(plain, "")
    assert Tags(html).open == []
    assert "Divergence" not in html
    assert "Evaluated in float" in html


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_terminal_shows_the_same(evaluation: Evaluation, width: int) -> None:
    console = Console(width=width, file=StringIO())
    with console.capture() as shown:
        console.print(render_evaluation(evaluation))
    text = shown.get()
    assert all(len(line) <= width for line in text.splitlines())
    assert "without quantizing layer 1, expert 3: mean KL 0.002, 10% more" in " ".join(text.split())
    assert "Load of each expert" in text
