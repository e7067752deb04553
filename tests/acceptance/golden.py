"""Hold the pipeline's own functions against a recorded run of the published method.

    python -m tests.acceptance.golden DIRECTORY

The directory holds a model, requests, prefixes, a corpus, and what an independent run recorded of
them. Prints the largest errors as one JSON object and exits with 1 if one is above its tolerance.
"""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import load_file
from torch import Tensor

from memit.evaluation.counterfact import prompts_of, score_prompts, summarise
from memit.hyperparameters import Hyperparameters
from memit.language_model import LanguageModel, load_model
from memit.layer_walk import layer_keys
from memit.quadratic import Quadratic
from memit.requests import Record, read_counterfact
from memit.second_moment import SecondMoment, collect_second_moments
from memit.spread import spread
from memit.targets import compute_targets, edit_rows
from tests.reference import relative

TENSOR_TOLERANCE = 1e-4
"""‖a − b‖_F / ‖b‖_F of any target, key, delta or covariance tensor."""
NLL_TOLERANCE = 1e-3
"""Nats, absolute."""
TOKEN_BUDGET = 4096

SUMMARY = {"ES": "efficacy", "PS": "paraphrase", "NS": "neighborhood"}
KINDS = ("rewrite", "paraphrase", "neighborhood")


@dataclass(frozen=True)
class Golden:
    """A recorded run."""

    directory: Path
    expected: dict[str, Any]
    tensors: dict[str, Tensor]
    covariance: dict[int, Tensor]
    records: list[Record]
    prefixes: list[str]

    @property
    def hyperparameters(self) -> Hyperparameters:
        """The settings of the run."""
        recorded = self.expected["hparams"]
        return Hyperparameters(
            layers=tuple(recorded["layers"]),
            covariance_weight=recorded["covariance_weight"],
            evaluations=recorded["steps"],
            learning_rate=recorded["learning_rate"],
            clamp_factor=recorded["clamp_factor"],
            weight_decay=recorded["weight_decay"],
            kl_factor=recorded["kl_factor"],
        )


def read_golden(directory: Path) -> Golden:
    """Read everything but the model and the corpus."""
    covariance = load_file(directory / "covariance.safetensors")
    contexts = json.loads((directory / "contexts.json").read_text(encoding="utf-8"))
    templates = [template for group in contexts for template in group if template != "{}"]
    return Golden(
        directory=directory,
        expected=json.loads((directory / "expected.json").read_text(encoding="utf-8")),
        tensors=load_file(directory / "expected.safetensors"),
        covariance={int(layer): matrix for layer, matrix in covariance.items()},
        records=read_counterfact(directory / "requests.json"),
        prefixes=[template.removesuffix("{}") for template in templates],
    )


def compare(directory: Path) -> dict[str, float | bool]:
    """The largest errors of our functions against the recorded run."""
    golden = read_golden(directory)
    lm = load_model(directory / "model", device="cpu")
    before = score_prompts(lm, prompts_of(golden.records), token_budget=TOKEN_BUDGET)
    errors: dict[str, float | bool] = {"covariance": _covariance_error(golden, lm)}
    errors |= _edit_errors(golden, lm)
    after = score_prompts(lm, prompts_of(golden.records), token_budget=TOKEN_BUDGET)
    states = (("pre", before), ("post", after))
    errors["nll"] = max(_nll_error(golden.expected[name], table) for name, table in states)
    errors["summary_equal"] = all(
        _same_summary(golden.expected["summary"][name], table) for name, table in states
    )
    return errors


def _covariance_error(golden: Golden, lm: LanguageModel) -> float:
    text = (golden.directory / "corpus.txt").read_text(encoding="utf-8")
    documents = [line for line in text.split("\n") if line]
    layers = sorted(golden.covariance)
    moments = collect_second_moments(lm, documents, layers, token_budget=TOKEN_BUDGET)
    return max(relative(moments[la].mean, golden.covariance[la]) for la in layers)


def _edit_errors(golden: Golden, lm: LanguageModel) -> dict[str, float]:
    """Errors of targets, keys and deltas; leaves the edit on the model."""
    hp = golden.hyperparameters
    requests = [record.request for record in golden.records]
    targets = compute_targets(lm, requests, golden.prefixes, hp, token_budget=TOKEN_BUDGET)
    result = spread(
        lm,
        requests,
        golden.prefixes,
        targets.z,
        lambda la: Quadratic(SecondMoment(golden.covariance[la], 1), float(hp.covariance_weight)),
        hp,
        token_budget=TOKEN_BUDGET,
    )
    result.delta.apply(lm)
    edits = edit_rows(lm, requests, golden.prefixes)
    found = layer_keys(lm, edits, hp.layers, hp.key_average, token_budget=TOKEN_BUDGET)
    keys = {layer: K.T for layer, K in found.items()}
    deltas = {la: result.delta.changes[lm.weight_name(la)].dense() for la in hp.layers}
    recorded = golden.tensors
    return {
        "targets": relative(targets.z, recorded["targets"]),
        "keys": max(relative(keys[la], recorded[f"keys.{la}"]) for la in hp.layers),
        "deltas": max(relative(deltas[la], recorded[f"delta.{la}"]) for la in hp.layers),
    }


def _nll_error(recorded: Sequence[dict[str, Any]], table: pa.Table) -> float:
    ours = zip(table["nll_new"].to_pylist(), table["nll_true"].to_pylist(), strict=True)
    pairs = zip(ours, _recorded_nlls(recorded), strict=True)
    return max(abs(a - b) for found, wanted in pairs for a, b in zip(found, wanted, strict=True))


def _recorded_nlls(recorded: Iterable[dict[str, Any]]) -> list[tuple[float, float]]:
    return [
        (prompt["target_new"], prompt["target_true"])
        for record in recorded
        for kind in KINDS
        for prompt in record[f"{kind}_prompts_probs"]
    ]


def _same_summary(recorded: dict[str, float], table: pa.Table) -> bool:
    ours = summarise(table)
    return all(math.isclose(recorded[name], ours[SUMMARY[name]]) for name in SUMMARY)


def within_tolerance(errors: dict[str, float | bool]) -> bool:
    """Whether every error is as small as two separate implementations can expect."""
    tensors = (errors[name] for name in ("covariance", "targets", "keys", "deltas"))
    return (
        all(error <= TENSOR_TOLERANCE for error in tensors)
        and errors["nll"] <= NLL_TOLERANCE
        and bool(errors["summary_equal"])
    )


def main(arguments: Sequence[str]) -> int:
    """Compare with the directory that is named and print the errors."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python -m tests.acceptance.golden DIRECTORY", file=sys.stderr)
        return 2
    torch.use_deterministic_algorithms(True, warn_only=True)
    errors = compare(Path(arguments[0]))
    print(json.dumps(errors))
    return 0 if within_tolerance(errors) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
