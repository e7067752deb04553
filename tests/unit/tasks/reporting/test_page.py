"""The page of the report on made-up results: what it shows, and how it behaves in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from memit.evaluation.counterfact import Kind, facts_table
from memit.requests import EditRequest, Record
from tasks.engine.loaded_model import ModelFiles
from tasks.reporting.figures import draw_losses, draw_margins, draw_updates
from tasks.reporting.page import Results, render

EVIL = "<script>alert('x')</script>"
"""A subject whose name is markup."""
MODEL = ModelFiles(
    source="hub",
    id="owner/model",
    revision="abc",
    files={},
    architecture="GPT2LMHeadModel",
    layers=4,
    width=8,
    inner_width=32,
    parameters=1000,
)


def prompt(case: int, kind: Kind, text: str, before: float, after: float) -> dict[str, Any]:
    """A scored prompt whose new object has these margins over the true one."""
    row = {"case_id": case, "kind": kind, "prompt": text, "target_new": "Rome"}
    row["target_true"] = "Paris"
    for state, margin in (("before", before), ("after", after)):
        row |= {f"nll_new_{state}": 5 - margin, f"nll_true_{state}": 5.0}
        row |= {f"hit_new_{state}": margin > 2, f"hit_true_{state}": margin < -2}
    return row


def made_up(count: int, neighbors: int = 2) -> Results:
    """`count` edits to Rome: every third does not take, every fourth hurts all its neighbours."""
    records, rows, texts = [], [], []
    for case in range(count):
        subject = EVIL if case == 1 else f"Person {case}"
        request = EditRequest(subject, "{} lives in", "Rome", "Paris", ("home", "town")[case % 2])
        records.append(Record(case, request))
        after = -1.0 if case % 3 == 2 else 1.0 + case % 4
        rows.append(prompt(case, "rewrite", request.text, -3, after))
        rows += [prompt(case, "paraphrase", f"{subject}'s city is", -3, after)]
        loss = 4.0 + 0.01 * case if case % 4 == 3 else 1.0
        for number in range(neighbors):
            text = f"Neighbor {case}-{number} lives in"
            rows.append(prompt(case, "neighborhood", text, -3, -3 + loss))
        text = f"{request.text} Rome, not in <b>Paris</b>"
        texts.append({"case_id": case, "prompt": request.text} | {"text_before": text})
        texts[-1]["text_after"] = text
    measured = {"score": 81.23456, "efficacy": 66.6, "efficacy_accuracy": 33.3, "perplexity": 1.5}
    after = measured | {f"{name}_low": 1.0 for name in measured}
    after |= {f"{name}_high": 99.0 for name in measured} | {"records": count}
    edit = {"count": count, "layers": [1, 2], "update_ratio": {"1": 0.1, "2": 0.2}}
    edit |= {"residuals": {"1": 3.0, "2": 2.0}, "hyperparameters": {}, "dropped": []}
    table = pyarrow.Table.from_pylist(rows)
    states = [
        table.rename_columns([name.removesuffix(f"_{state}") for name in table.column_names])
        for state in ("before", "after")
    ]
    figures = {"margins": draw_margins(table), "updates": draw_updates(edit)}
    figures["losses"] = draw_losses(np.array([[2.0, 1.0], [2.0, np.nan]]))
    return Results(
        metrics={"before": measured, "after": after, "edit": edit},
        edit=edit,
        model=MODEL,
        records=records,
        prompts=table,
        facts=facts_table(*states),
        texts=pyarrow.Table.from_pylist(texts),
        parameters={"model": {"id": EVIL}, "requests": {"path": "https://me:secret@host/x"}},
        provenance={"code": "0123abcd"},
        figures=figures,
    )


@pytest.fixture(scope="module")
def page() -> str:
    return render(made_up(12))


def test_it_shows_the_numbers_of_the_metrics(page: str) -> None:
    shown = [float(value) for value in re.findall(r'<data value="([^"]*)">', page)]
    assert {81.23456, 66.6, 33.3, 1.5} == set(shown)
    assert ">81.2<" in page
    assert "1.0–99.0" in page


def test_text_of_data_sets_is_escaped(page: str) -> None:
    assert EVIL not in page
    assert page.count("<script") == 1
    assert html.escape(EVIL).replace("&#x27;", "&#39;") in page
    assert "&lt;b&gt;<mark>Paris</mark>&lt;/b&gt;" in page
    assert "secret" not in page


def test_it_fetches_nothing_and_repeats_itself_to_the_byte(page: str) -> None:
    assert page == render(made_up(12))
    fetching = r"""(?:src|href)=(?!["']?(?:#|data:))|url\((?!#)|@import|fetch\("""
    assert re.findall(fetching, page) == []


def test_facts_are_in_order_and_the_worst_neighbours_first(page: str) -> None:
    assert re.findall(r'<tbody id="fact-(\d+)"', page) == [str(case) for case in range(12)]
    worst = page[page.index('id="harm"') :]
    assert re.findall(r"Neighbor (\d+-\d)", worst)[:4] == ["11-0", "11-1", "7-0", "7-1"]
    assert page.count('<tbody id="fact-2" class="missed"') == 1
    assert page.count('<tbody id="fact-3" class="took hurts"') == 1
    assert page.count('<tbody id="fact-0" class="preferred"') == 1


def test_a_thousand_facts_are_at_most_four_megabytes() -> None:
    assert len(render(made_up(1000, neighbors=10)).encode()) < 4e6


# --- in a browser ---------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SCRIPT = """<!doctype html><body><script>
const open = (hash, width) => new Promise((done) => {
  const frame = document.createElement("iframe");
  frame.style.width = `${width}px`;
  frame.onload = () => done(frame.contentWindow);
  frame.src = `index.html${hash}`;
  document.body.append(frame);
});
const shown = ({ document }) =>
  [...document.querySelectorAll("#facts > tbody")].filter((body) => body.offsetHeight)
    .map((body) => +body.id.slice(5));
(async () => {
  const found = {};
  const wide = await open("", 1200);
  found.background = wide.getComputedStyle(wide.document.body).backgroundColor;
  const search = wide.document.getElementById("search");
  search.value = "person 11";
  search.dispatchEvent(new wide.Event("input"));
  found.searched = shown(wide);
  const row = wide.document.querySelector("#fact-11 .rows");
  found.closed = row.offsetHeight;
  wide.document.querySelector("#fact-11 button").click();
  found.opened = row.offsetHeight > 0;
  found.linked = shown(await open("#fact=5", 1200));
  found.hurts = shown(await open("#show=hurts&sort=-1", 1200));
  const sorted = await open("", 1200);
  sorted.document.querySelectorAll("#facts th button")[5].click();
  found.sorted = shown(sorted).slice(0, 4);
  for (const width of [400, 320]) {
    const narrow = await open("#fact=3", width);
    const root = narrow.document.documentElement;
    found[width] = root.scrollWidth - root.clientWidth;
  }
  document.body.textContent = JSON.stringify(found);
})();
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_it_searches_sorts_and_fits_narrow_and_dark_windows(page: str, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(page)
    (tmp_path / "script.html").write_text(SCRIPT)
    dark, light = (
        in_browser(tmp_path, ["--blink-settings=preferredColorScheme=" + n]) for n in "01"
    )
    assert light["searched"] == [11]
    assert (light["closed"], light["opened"]) == (0, True)
    assert light["linked"] == list(range(12))
    assert light["hurts"] == [11, 7, 3]
    assert light["sorted"] == [2, 5, 8, 11]  # the lowest margins
    assert (light["400"], light["320"]) == (0, 0)
    brightness = [sum(map(int, re.findall(r"\d+", each["background"]))) for each in (dark, light)]
    assert brightness[0] < 150 < 600 < brightness[1]


def in_browser(folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """What the script finds."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--allow-file-access-from-files", "--virtual-time-budget=5000", *options]
    command += [f"--user-data-dir={folder / 'profile'}", (folder / "script.html").as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = re.search(r"<body>(\{.*\})</body>", ran.stdout)
    assert found, ran.stdout[-500:]
    return json.loads(html.unescape(found[1]))
