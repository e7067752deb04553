"""The tables and figures of comparisons: which columns they have, and what each cell contains."""

import csv
import io
from dataclasses import replace

import numpy as np
import pytest

from memit.evaluation.counterfact import harmonic_mean
from tasks.reporting import comparison, scaling
from tasks.reporting.comparison import Comparison
from tasks.reporting.formats import ABSENT
from tasks.reporting.published import SOURCES, TABLES, published
from tasks.reporting.scaling import Point, curve

COMPARISON = Comparison(
    model="gpt-j-6b",
    records=10_000,
    edits={"unedited": 10_000, "memit": 10_000},
    methods={
        "unedited": {"score": 22.0, "efficacy": 15.0, "seconds": 0.0},
        "memit": {"score": 85.0, "score_low": 84.5, "score_high": 85.5, "seconds": 20.0},
    },
    exact_entropy=True,
    only_known=False,
    published=published("counterfact", "EleutherAI/gpt-j-6b", 10_000),
    notes=("a note",),
)


def test_absent_metrics_are_marked_and_never_zero() -> None:
    page = comparison.markdown(COMPARISON)
    assert f"| MEMIT | 85.0 [84.5, 85.5] | {ABSENT} | {ABSENT} | {ABSENT} | 20.0 |" in page
    rows = list(csv.DictReader(io.StringIO(comparison.csv_text(COMPARISON))))
    assert [row["efficacy"] for row in rows] == ["15.0", ""]
    shown = dict.fromkeys(("ES", "PS", "NS"), ABSENT)
    row = {"method": "MEMIT", "S": "85.0", **shown, "seconds": "20.0"}
    assert comparison.table_rows(COMPARISON)[1] == row
    assert "seconds" not in comparison.plain(COMPARISON)["memit"]


def test_s_of_known_facts_is_called_so() -> None:
    known = replace(COMPARISON, only_known=True)
    for page in (
        comparison.markdown(known),
        str(comparison.table_rows(known)),
        scaling.markdown(POINTS, [], only_known=True),
    ):
        assert "S (known facts)" in page
    assert "known facts" not in comparison.markdown(COMPARISON)


def test_fewer_edits_of_a_method_are_said_and_not_compared_with_the_papers() -> None:
    page = comparison.markdown(replace(COMPARISON, edits={"unedited": 10_000, "memit": 16}))
    assert "| MEMIT (16 edits) | 85.0 [84.5, 85.5] |" in page
    assert "| unedited | 22.0 |" in page
    assert "85.8" not in page


def test_the_papers_results_are_shown_only_for_its_models_and_number_of_edits() -> None:
    page = comparison.markdown(COMPARISON)
    assert "| MEMIT | 85.0 / 85.8 / -0.8 |" in page
    assert f"{ABSENT} / 98.9 / {ABSENT}" in page
    assert published("counterfact", "EleutherAI/gpt-j-6b", 9_999) == {}
    assert published("counterfact", "openai-community/gpt2-xl", 10_000) == {}
    assert "85.8" not in comparison.markdown(replace(COMPARISON, published={}))


@pytest.mark.parametrize("table", TABLES)
def test_published_scores_are_the_harmonic_means_of_their_parts(
    table: tuple[str, str, int],
) -> None:
    assert table[2] in SOURCES
    for row in published(*table).values():
        assert row.neighborhood is not None
        parts = [row.efficacy, row.paraphrase, row.neighborhood]
        assert row.score == pytest.approx(harmonic_mean(parts), abs=0.15)


PARTS = {"efficacy": 100.0, "paraphrase": 100.0}
POINTS = [
    Point("memit", 1, 0, {"score": 0.0, **PARTS, "neighborhood": 0.0}),
    Point("memit", 1, 1, {"score": 100.0, **PARTS, "neighborhood": 100.0}),
    Point("memit", 10, 0, {"efficacy": 90.0, "seconds": 3.0}),
    Point("unedited", 1, 0, {"efficacy": 1.0, "seconds": 0.0}),
]


def test_curves_pool_the_samples_of_a_size() -> None:
    (score,) = curve(POINTS, "memit", "score")
    assert (score.edits, score.value) == (1, pytest.approx(harmonic_mean([100.0, 100.0, 50.0])))
    assert score.deviation == pytest.approx(np.std([0.0, 100.0], ddof=1))
    efficacy = curve(POINTS, "memit", "efficacy")
    found = [(mean.edits, mean.value, mean.deviation) for mean in efficacy]
    assert found == [(1, 100.0, 0.0), (10, 90.0, 0.0)]


def test_the_scaling_tables_mark_what_was_not_measured() -> None:
    page = scaling.markdown(POINTS, ["a note"], only_known=False)
    assert f"| MEMIT | 75.0 ± 70.7 | {ABSENT} |" in page
    assert f"| unedited | 1.0 | {ABSENT} |" in page
    rows = list(csv.DictReader(io.StringIO(scaling.csv_text(POINTS))))
    assert (rows[1]["method"], rows[1]["edits"], rows[1]["seed"]) == ("memit", "1", "1")
    assert rows[3]["score"] == ""
    assert scaling.plain(POINTS)["memit"]["10"] == {"efficacy": 90.0}


def test_equal_points_give_equal_figures(tmp_path) -> None:
    for name in ("a.png", "b.png"):
        scaling.draw_scaling(POINTS, tmp_path / name, only_known=False)
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content == (tmp_path / "b.png").read_bytes()
