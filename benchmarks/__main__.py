"""Run the benchmark: `python -m benchmarks [--quick]`, on the GPU if there is one."""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import steps
from benchmarks.floor import measure_machine
from benchmarks.steps import Bench
from benchmarks.workload import GPTJ, GPTJ_TINY, SMALL, Shape, make_model, make_tokenizer
from memit import reference as oracle
from memit.language_model import LanguageModel

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Time all steps and write the table and, where matplotlib is installed, its figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the table is written")
    parser.add_argument("--threads", type=int, help="CPU threads for ours and the oracle alike")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    on_gpu = torch.cuda.is_available()
    rows = gpu_rows(options.quick) if on_gpu else cpu_rows(options.quick)
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{_slug(device_name())}.json"
    path.write_text(json.dumps({"machine": description(), "rows": rows}, indent=1) + "\n")
    print(f"\n{markdown(rows)}\n\nwritten to {path}")
    try:
        from benchmarks.figure import draw
    except ImportError:
        print("matplotlib is not installed: no figure")
    else:
        print(f"figure in {draw(path)}")


def cpu_rows(quick: bool) -> list[dict[str, Any]]:
    """Every step on the small model, ours and the oracle's."""
    bench = _bench(SMALL, "cpu", torch.float32)
    edits = steps.with_budget(bench, trained=True)
    count, tokens = (8, 2_000) if quick else (64, 40_000)
    rows = [
        _beside(steps.targets(edits, count), "targets", steps.oracle_targets(edits, count) * count),
        _beside(steps.spread_step(edits, count), "spread", steps.oracle_spread(edits, count)),
        _beside(
            steps.covariance(bench, tokens, range(4)),
            "covariance, 4 layers",
            steps.oracle_covariance(bench, tokens, range(4)),
        ),
    ]
    ours = steps.evaluation(bench, count)
    for name, evaluate in (
        ("evaluation, oracle by record", oracle.evaluate),
        ("evaluation, oracle by prompt and object", steps.evaluate_singly),
    ):
        rows.append(_beside(ours, name, steps.oracle_evaluation(bench, count, evaluate)))
    for size in (16, 32) if quick else (64, 256, 1024, 4096):
        rows.append(_shown({"step": "growth: targets", **steps.targets(edits, size, repeats=1)}))
        rows.append(_shown({"step": "growth: spread", **steps.spread_step(edits, size, repeats=1)}))
    return rows


def gpu_rows(quick: bool, device: str = "cuda") -> list[dict[str, Any]]:
    """The steps at GPT-J's shape in bf16, and the oracle's targets in float32."""
    shape = GPTJ_TINY if quick else GPTJ
    sizes = (8, 16) if quick else (100, 1000)
    bench = _bench(shape, device, torch.bfloat16, with_oracle=False)
    trained = steps.with_budget(bench, trained=True)
    rows = [
        _shown({"step": "targets", **steps.targets(trained, size, repeats=1)}) for size in sizes
    ]
    tokens = 4_000 if quick else 400_000
    rows.append(
        _shown({"step": "covariance, 6 layers", **steps.covariance(bench, tokens, shape.layers, 1)})
    )
    rows.append(_shown({"step": "spread", **steps.spread_step(bench, sizes[-1], repeats=1)}))
    rows.append(_shown({"step": "evaluation", **steps.evaluation(bench, sizes[0], repeats=1)}))
    solve = steps.solve_step(bench, 10 * sizes[-1])
    rows.append(_shown(_whole_job(rows, solve, sizes[-1], len(shape.layers))))
    torch.backends.cuda.matmul.allow_tf32 = False
    float32 = replace(bench, literal=make_model(shape, device, torch.float32))
    literal = steps.oracle_targets(float32, 2 if quick else 20)
    ours = rows[len(sizes) - 1]
    return [*rows, _beside(ours, "targets, oracle in float32", literal * ours["count"])]


def _whole_job(
    rows: list[dict[str, Any]], solve_seconds: float, count: int, layers: int
) -> dict[str, Any]:
    """10,000 edits with a covariance of 2M tokens, from the measured steps."""
    by_step = {row["step"]: row for row in rows}
    edits = 10_000
    parts = {
        "targets": by_step["targets"]["seconds_per_edit"] * edits,
        "covariance": 2_000_000 / by_step["covariance, 6 layers"]["tokens_per_second"],
        "spread": by_step["spread"]["seconds"] * edits / count + layers * solve_seconds,
        "evaluation": 2 * edits / by_step["evaluation"]["records_per_second"],
    }
    peak = max(row["peak_bytes"] for row in rows)
    return {
        "step": "whole job, projected",
        "count": edits,
        "seconds": sum(parts.values()),
        "parts": parts,
        "peak_bytes": peak,
    }


def _bench(shape: Shape, device: str, dtype: torch.dtype, with_oracle: bool = True) -> Bench:
    tokenizer = make_tokenizer(shape.vocabulary)
    lm = LanguageModel(make_model(shape, device, dtype), tokenizer, name=shape.name)
    literal = make_model(shape, device, dtype) if with_oracle else lm.model
    machine = measure_machine(device, dtype)
    bench = Bench(shape, lm, device, machine, token_budget=1, literal=literal)
    return steps.with_budget(bench, trained=False)


def _beside(ours: dict[str, Any], step: str, oracle_seconds: float) -> dict[str, Any]:
    speedup = oracle_seconds / ours["seconds"]
    return _shown({**ours, "step": step, "oracle_seconds": oracle_seconds, "speedup": speedup})


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    times = f"× {row['speedup']:.1f} the oracle" if "speedup" in row else ""
    share = f"{row['share_of_floor']:.0%} of the floor" if "share_of_floor" in row else ""
    print(
        f"{row['step']:42} n {row.get('count', row.get('tokens', '')):>6}  "
        f"{row['seconds']:9.3f} s  {row['peak_bytes'] / 1e6:8.0f} MB  {share:20} {times}",
        flush=True,
    )
    return row


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/performance.md."""
    lines = [
        "| step | n | seconds | peak, MB | beside the oracle | share of the floor |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = f"× {row['speedup']:.1f}" if "speedup" in row else "–"
        share = f"{row['share_of_floor']:.0%}" if "share_of_floor" in row else "–"
        count = f"{row.get('count', row.get('tokens')):,}"
        seconds, peak = f"{row['seconds']:.2f}", f"{row['peak_bytes'] / 1e6:.0f}"
        lines.append(f"| {row['step']} | {count} | {seconds} | {peak} | {times} | {share} |")
    return "\n".join(lines)


def device_name() -> str:
    """The GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.get_num_threads()} threads"


def description() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "device": device_name(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    main()
