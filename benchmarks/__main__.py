"""Run the benchmark: `python -m benchmarks [--quick]`, on the GPU if there is one."""

import argparse
import json
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import steps
from benchmarks.edited import METRICS, edited_rows
from benchmarks.floor import Timing, measure_machine
from benchmarks.steps import Bench
from benchmarks.workload import (
    GPTJ,
    GPTJ_TINY,
    LLAMA3,
    LLAMA_TINY,
    SMALL,
    SMOLLM2,
    Shape,
    make_documents,
    make_model,
    make_tokenizer,
)
from memit import reference as oracle
from memit.hyperparameters import preset
from memit.language_model import LanguageModel, load_model
from memit.requests import drop_conflicts, read_records

Row = dict[str, Any]
"""What was measured of a step."""
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Time all steps and write the table, after each row, and where matplotlib is installed its
    figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the table is written")
    parser.add_argument("--threads", type=int, help="CPU threads for ours and the oracle alike")
    parser.add_argument(
        "--model", help="on a GPU: also edit this model, a GGUF file or a directory"
    )
    parser.add_argument("--facts", type=Path, help="records in CounterFact's form, to edit it with")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if torch.cuda.is_available():
        parts = [gpu_rows(GPTJ_TINY if options.quick else GPTJ, options.quick)]
        if options.model and options.facts:
            lm, (records, _) = (
                load_model(options.model),
                drop_conflicts(read_records(options.facts)),
            )
            counts = (8, 16) if options.quick else (100, 1_000, len(records))
            parts.append(edited_rows(lm, preset(lm.name, lm.shape), records, counts))
        parts.append(gpu_rows(LLAMA_TINY if options.quick else LLAMA3, options.quick))
    else:
        parts = [cpu_rows(options.quick), real_rows(options.quick)]
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{_slug(device_name())}.json"
    rows: list[dict[str, Any]] = []
    for row in chain.from_iterable(parts):
        rows.append(_shown(row))
        path.write_text(json.dumps({"machine": description(), "rows": rows}, indent=1) + "\n")
    print(f"\n{markdown(rows)}\n\nwritten to {path}")
    try:
        from benchmarks.figure import draw
    except ImportError:
        print("matplotlib is not installed: no figure")
    else:
        print(f"figure in {draw(path)}")


def cpu_rows(quick: bool) -> Iterator[Row]:
    """Every step on the small model, ours and the oracle's."""
    bench = _bench(SMALL, "cpu", torch.float32)
    edits = steps.with_budget(bench, trained=True)
    count, tokens = (8, 2_000) if quick else (64, 40_000)
    literal = steps.oracle_targets(edits, count)
    yield _beside(steps.targets(edits, count), "targets", literal)
    yield _beside(steps.spread_step(edits, count), "spread", steps.oracle_spread(edits, count))
    literal = steps.oracle_covariance(bench, tokens, range(4))
    yield _beside(steps.covariance(bench, tokens, range(4)), "covariance, 4 layers", literal)
    ours = steps.evaluation(bench, count)
    for name, evaluate in (
        ("evaluation, oracle by record", oracle.evaluate),
        ("evaluation, oracle by prompt and object", steps.evaluate_singly),
    ):
        yield _beside(ours, name, steps.oracle_evaluation(bench, count, evaluate))
    for size in (16, 32) if quick else (64, 256, 1024, 4096):
        yield {"step": "growth: targets", **steps.targets(edits, size, repeats=1)}
        yield {"step": "growth: spread", **steps.spread_step(edits, size, repeats=1)}


def real_rows(quick: bool) -> Iterator[Row]:
    """Every step at SmolLM2-135M's shape; the oracle does two edits, records or texts, or part of
    the tokens, and its times are scaled."""
    shape = LLAMA_TINY if quick else SMOLLM2
    bench = _bench(shape, "cpu", torch.float32)
    edits = steps.with_budget(bench, trained=True)
    literal = steps.oracle_targets(edits, 2).times(4)
    yield _beside(steps.targets(edits, 8, repeats=1), f"targets, {shape.name}", literal)
    literal = steps.oracle_spread(edits, 2, repeats=1).times(8)
    yield _beside(steps.spread_step(edits, 16, repeats=1), f"spread, {shape.name}", literal)
    ours = steps.covariance(bench, 8_000, shape.layers, repeats=1)
    part = ours["tokens"] / steps.tokens_in(make_documents(shape, 1_000))
    literal = steps.oracle_covariance(bench, 1_000, shape.layers).times(part)
    yield _beside(ours, f"covariance, {shape.name}", literal)
    literal = steps.oracle_evaluation(bench, 2, steps.evaluate_singly).times(4)
    yield _beside(steps.evaluation(bench, 8, repeats=1), f"evaluation, {shape.name}", literal)
    literal = steps.oracle_generation(bench, 2, 32).times(32)
    ours = steps.generation(bench, 64, 32, repeats=1)
    yield _beside(ours, f"generation, {shape.name}", literal)


def gpu_rows(shape: Shape, quick: bool, device: str = "cuda") -> Iterator[Row]:
    """The steps at a shape in bf16, and the oracle's targets in float32."""
    sizes = (8, 16) if quick else (100, 1000)
    bench = _bench(shape, device, torch.bfloat16, with_oracle=False)
    trained = steps.with_budget(bench, trained=True)
    rows: list[Row] = []

    def named(step: str, row: Row) -> Row:
        rows.append({"step": f"{step}, {shape.name}", **row})
        return rows[-1]

    for size in sizes:
        yield named("targets", steps.targets(trained, size, repeats=1))
    tokens = 4_000 if quick else 400_000
    yield named("covariance", steps.covariance(bench, tokens, shape.layers, 1))
    yield named("spread", steps.spread_step(bench, sizes[-1], repeats=1))
    yield named("evaluation", steps.evaluation(bench, sizes[0], repeats=1))
    solve = steps.solve_step(bench, 10 * sizes[-1])
    yield _whole_job(rows, solve, sizes[-1], shape)
    torch.backends.cuda.matmul.allow_tf32 = False
    float32 = replace(bench, literal=make_model(shape, device, torch.float32))
    count = 2 if quick else 20
    literal = steps.oracle_targets(float32, count).times(sizes[-1] / count)
    yield _beside(rows[len(sizes) - 1], f"targets, oracle in float32, {shape.name}", literal)


def _whole_job(rows: Sequence[Row], solve_seconds: float, count: int, shape: Shape) -> Row:
    """10,000 edits with a covariance of 2M tokens, from the measured steps."""
    by_step = {row["step"].partition(",")[0]: row for row in rows}
    edits = 10_000
    solves = len(shape.layers) * solve_seconds
    parts = {
        "targets": by_step["targets"]["seconds_per_edit"] * edits,
        "covariance": 2_000_000 / by_step["covariance"]["tokens_per_second"],
        "spread": by_step["spread"]["seconds"] * edits / count + solves,
        "evaluation": 2 * edits / by_step["evaluation"]["records_per_second"],
    }
    peak = max(row["peak_bytes"] for row in rows)
    return {
        "step": f"whole job, projected, {shape.name}",
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


def _beside(ours: Row, step: str, literal: Timing) -> Row:
    seconds, cpu_seconds = literal
    return {
        **ours,
        "step": step,
        "oracle_seconds": seconds,
        "oracle_cpu_seconds": cpu_seconds,
        "speedup": seconds / ours["seconds"],
    }


def _shown(row: Row) -> Row:
    times = f"× {row['speedup']:.1f} the oracle" if "speedup" in row else ""
    share = f"{row['share_of_floor']:.0%} of the floor" if "share_of_floor" in row else ""
    quality = " ".join(f"{name} {row[name]:.1f}" for name in METRICS.values() if name in row)
    print(
        f"{row['step']:42} n {row.get('count', row.get('tokens', '')):>6}  "
        f"{row['seconds']:9.3f} s  {row['peak_bytes'] / 1e6:8.0f} MB  {share:20} {times}{quality}",
        flush=True,
    )
    return row


def markdown(rows: Sequence[Row]) -> str:
    """The table of docs/performance.md."""
    lines = [
        "| step | n | seconds | CPU-seconds | peak, MB | beside the oracle | share of the floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = f"× {row['speedup']:.1f}" if "speedup" in row else "–"
        share = f"{row['share_of_floor']:.0%}" if "share_of_floor" in row else "–"
        count = f"{row.get('count', row.get('tokens')):,}"
        seconds, peak = f"{row['seconds']:.2f}", f"{row['peak_bytes'] / 1e6:.0f}"
        cpu = f"{row['cpu_seconds']:.2f}" if "cpu_seconds" in row else "–"
        cells = row["step"], count, seconds, cpu, peak, times, share
        lines.append(f"| {' | '.join(cells)} |")
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
