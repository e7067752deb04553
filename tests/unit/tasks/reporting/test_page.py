"""The page of the report on made-up results: what it shows, and how it behaves in a browser."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from memit.evaluation.counterfact import facts_table
from memit.evaluation.kept import SCHEMA as KEPT_SCHEMA
from memit.requests import EditRequest, Record
from tasks.engine.loaded_model import ModelFiles
from tasks.reporting.figures import draw_losses, draw_margins, draw_updates
from tasks.reporting.page import Results, render

EVIL = "<script>alert('x')</script>"
SIZES = dict.fromkeys(("layers", "width", "inner_width", "parameters"), 4)
MODEL = ModelFiles(source="hub", id="a/b", revision="c", files={}, architecture="GPT2", **SIZES)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def prompt(case: int, kind: str, text: str, after: float) -> dict[str, Any]:
    """A prompt on which Rome's margin over Paris was −3 and is `after`; case 0 knows no Paris."""
    true = "Paris" if case else None
    row = {"case_id": case, "kind": kind, "prompt": text, "target_new": "Rome", "target_true": true}
    for state, margin in (("before", -3.0), ("after", after)):
        row |= {f"nll_new_{state}": 5 - margin, f"nll_true_{state}": 5.0 if true else None}
        row |= {f"hit_new_{state}": margin > 2, f"hit_true_{state}": margin < -2 if true else None}
    return row


def made_up(count: int, neighbors: int = 2) -> Results:
    """`count` edits to Rome: every third does not take, every fourth hurts all its neighbours."""
    records, rows, texts = [], [], []
    for case in range(count):
        subject = EVIL if case == 1 else f"Person {case}"
        true = "Paris" if case else None
        request = EditRequest(subject, "{} lives in", "Rome", true, relation_id=str(case % 2))
        records.append(Record(case, request))
        after = -1.0 if case % 3 == 2 else 1.0 + case % 4
        rows += [prompt(case, kind, request.text, after) for kind in ("rewrite", "paraphrase")]
        loss = 4.0 + 0.01 * case if case % 4 == 3 else 1.0
        for number in range(neighbors):
            rows.append(prompt(case, "neighborhood", f"Neighbor {case}-{number} is in", loss - 3))
        texts.append(dict.fromkeys(("text_before", "text_after"), f"{request.text} <b>Paris</b>"))
        texts[-1] |= {"case_id": case, "prompt": request.text}
    measured = {"score": 81.23456, "efficacy": 66.6, "efficacy_accuracy": 33.3, "perplexity": 1.5}
    bounds = {f"{name}_{end}": at for name in measured for end, at in (("low", 1), ("high", 99))}
    edit = {"count": count, "layers": [1], "update_ratio": {"1": 0.1}, "residuals": {"1": 3.0}}
    edit |= {"dropped": [], "hyperparameters": {"site": "block"}}
    table = pyarrow.Table.from_pylist(rows)
    before, after = (
        table.rename_columns([name.removesuffix(f"_{state}") for name in table.column_names])
        for state in ("before", "after")
    )
    metrics = {"before": measured, "after": measured | bounds | {"records": count}}
    facts, written = facts_table(before, after), pyarrow.Table.from_pylist(texts)
    settings = {"model": {"id": EVIL}, "requests": {"path": "https://me:secret@host/x"}}
    figures = {"margins": draw_margins(table), "updates": draw_updates(edit)}
    figures["losses"] = draw_losses(np.array([[2.0, 1.0], [2.0, np.nan]]))
    kept = pyarrow.Table.from_pylist(
        [
            {"case_id": 2, "prompt": "Stay", "answer_before": f"as {EVIL}"}
            | {"answer_after": "or else", "same_answer": same == 2, "same_token": same > 0}
            | {"divergence": 0.5}
            for same in range(3)
        ],
        schema=KEPT_SCHEMA,
    )
    told = ["1 of 2 facts are said.", f"Damage: {EVIL}"]
    return Results(
        metrics, edit, MODEL, records, table, facts, kept, written, [], settings, {}, figures, told
    )


@pytest.fixture(scope="module")
def page() -> str:
    return render(made_up(12))


def test_it_shows_the_numbers_of_the_metrics(page: str) -> None:
    shown = map(float, re.findall(r'<data value="([^"]*)">', page))
    assert {81.23456, 66.6, 33.3, 1.5} == set(shown)
    assert '">81.2</data><small>1.0–99.0<' in page


def test_text_of_data_sets_is_escaped(page: str) -> None:
    assert page.count("<script") == 1  # the page's own
    assert html.escape(EVIL).replace("&#x27;", "&#39;") in page
    assert "&lt;b&gt;<mark>Paris</mark>&lt;/b&gt;" in page
    assert "secret" not in page


def test_it_fetches_nothing_and_repeats_itself(page: str) -> None:
    assert page == render(made_up(12))
    fetching = r"""(?:src|href)=(?!["']?(?:#|data:))|url\((?!#)|@import|fetch\("""
    assert re.findall(fetching, page) == []


def test_facts_are_in_order_and_the_worst_neighbours_first(page: str) -> None:
    assert re.findall(r'<tbody id="fact-(\d+)"', page) == [str(case) for case in range(12)]
    worst = page[page.index('id="harm"') :]
    assert re.findall(r"Neighbor (\d+-\d)", worst)[:4] == ["11-0", "11-1", "7-0", "7-1"]
    found = re.findall(r'<tbody id="fact-\d+" class="(.*?)"', page)
    assert found[:4] == ["missed", "preferred", "missed", "took hurts"]


def test_prompts_that_must_stay_and_the_verdict_are_shown() -> None:
    shown = render(made_up(3))
    assert '<li class="alarm">Damage: &lt;script&gt;' in shown
    for outcome in ("✗ hurt", "≈ begins as before", "✓ kept"):
        assert shown.count(f"must stay: {outcome}") == 1
    assert shown.index("or else") < shown.index('id="harm"') < shown.rindex("or else")


def test_own_words_and_rounded_weights_are_shown_where_they_were_asked_for(page: str) -> None:
    assert "Writes" not in page
    assert "rounded" not in page
    given = made_up(3)
    said = {"case_id": "2", "kind": "rewrite", "prompt": "Person 2 lives in"}
    said |= {"answer_before": "Paris itself", "answer_after": f"Rome {EVIL}"}
    after = {**given.metrics["after"], "generated_efficacy_contains": 44.4}
    before = {**given.metrics["before"], "generated_efficacy_contains": 11.1}
    int8 = {"efficacy": 55.5, "efficacy_accuracy": 22.2, "perplexity": 7.25}
    metrics = {"before": before, "after": after, "survival": {"int8": int8}}
    shown = render(replace(given, said=[said], metrics=metrics))
    numbers = set(map(float, re.findall(r'<data value="([^"]*)">', shown)))
    assert {11.1, 44.4, *int8.values()} < numbers
    without, fact = (shown[shown.index(f'id="fact-{case}"') :] for case in (0, 2))
    assert '<td class="more">–' in without[: without.index("<table>")]
    assert '<td class="more">Rome &lt;script' in fact[: fact.index("<table>")]
    assert "<td>Paris itself<td>Rome &lt;script" in fact


def test_a_thousand_facts_are_at_most_four_megabytes() -> None:
    assert len(render(made_up(1000, neighbors=10)).encode()) < 4e6


SCRIPT = """<!doctype html><body><script>
const open = (hash, width) => new Promise((done) => {
  const frame = document.createElement("iframe");
  frame.onload = () => done(frame.contentWindow);
  Object.assign(frame, { width, src: `index.html${hash}` });
  document.body.append(frame);
});
const shown = ({ document }) => [...document.querySelectorAll("#facts > tbody")]
  .filter((body) => body.offsetHeight).map((body) => +body.id.slice(5));
(async () => {
  const found = {}, wide = await open("", 1200), page = wide.document;
  const color = wide.getComputedStyle(page.body).backgroundColor;
  found.brightness = color.match(/\\d+/g).reduce((sum, part) => sum + +part, 0);
  page.querySelectorAll("#facts th button")[5].click();
  found.sorted = shown(wide).slice(0, 4);
  page.getElementById("search").value = "person 11";
  page.getElementById("search").dispatchEvent(new wide.Event("input"));
  found.searched = shown(wide);
  found.opened = [page.querySelector("#fact-11 .rows").offsetHeight > 0];
  page.querySelector("#fact-11 button").click();
  found.opened.push(page.querySelector("#fact-11 .rows").offsetHeight > 0);
  found.linked = shown(await open("#fact=5", 1200));
  found.hurts = shown(await open("#show=hurts&sort=-1", 1200));
  const narrow = [await open("#fact=3", 400), await open("#fact=3", 320)];
  found.overflow = narrow.map(({ document: { documentElement: root } }) =>
    root.scrollWidth - root.clientWidth);
  document.body.textContent = JSON.stringify(found);
})();
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_it_searches_sorts_and_fits_narrow_and_dark_windows(page: str, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(page)
    (tmp_path / "script.html").write_text(SCRIPT)
    options = "--headless --no-sandbox --disable-gpu --dump-dom --allow-file-access-from-files"
    command = [str(CHROMIUM), *options.split(), "--virtual-time-budget=5000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "script.html").as_uri()]
    found = []
    for scheme in (0, 1):  # dark, light
        mode = f"--blink-settings=preferredColorScheme={scheme}"
        output = subprocess.check_output([*command, mode], text=True, timeout=100)
        found.append(json.loads(html.unescape(output.split("<body>")[1].split("</body>")[0])))
    assert found[1].pop("brightness") > 600 > 150 > found[0].pop("brightness")
    expected = {"sorted": [2, 5, 8, 11], "searched": [11], "opened": [False, True]}
    expected |= {"linked": list(range(12)), "hurts": [11, 7, 3], "overflow": [0, 0]}
    assert found == [expected, expected]
