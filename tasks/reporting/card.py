"""The model card of an exported edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData

from memit.redaction import one_line
from tasks.reporting.formats import ROWS, markdown_table

Kind = Literal["merged", "lora", "delta"]

SHOWN = 20
"""Facts that a card names."""
USES = {
    "merged": "The weights are those of the base model with the edit in them; load them as any "
    "model of transformers. Without the edit: load the base model.",
    "lora": "A LoRA adapter: `PeftModel.from_pretrained(base, FOLDER)`. Without the edit: do not "
    "load it, or `model.unload()`. Other servers are in docs/serving.md of memit.",
    "delta": "The change of the weights: `memit apply DIR --delta delta.safetensors` puts it into "
    "a copy of the base model, and `memit revert DIR` takes it out, bit for bit.",
}
"""How to use each kind of export, and how to undo it."""


def make_card(
    kind: Kind,
    provenance: Mapping[str, Any],
    license_: str | None,
    metrics: Mapping[str, Any] | None,
    notes: Sequence[str] = (),
) -> ModelCard:
    """A card from a delta's provenance, the licence of the base model, and the metrics of the run,
    if they are known; `notes` are lines about the export."""
    model, count = provenance["model"], provenance.get("count", "some")
    library = {"merged": "transformers", "lora": "peft", "delta": "memit"}[kind]
    data = ModelCardData(
        base_model=model,
        license=license_,
        library_name=library,
        tags=["memit", "model-editing"],
    )
    revision = f", revision {provenance['revision']}" if provenance.get("revision") else ""
    lines = [
        f"# {model} with {count} edited facts",
        "",
        f"{count} facts were written into the weights of {model}{revision} by the method "
        f"`{provenance.get('method', 'unknown')}`.",
        "",
        *notes,
        "## Use and undo",
        "",
        USES[kind],
        "",
        "## Facts",
        "",
        *_facts(provenance),
        "",
        "## Measured",
        "",
        *_measured(metrics),
        "",
        "## Limits",
        "",
        "An edit teaches an answer to the wordings that were measured. What follows from a fact is "
        "not changed with it, prompts about similar subjects may change, and training the model "
        "further can undo it.",
        "",
        "## Settings",
        "",
        *markdown_table(
            [{"setting": key, "value": str(value)} for key, value in _settings(provenance).items()],
            text=(0, 1),
        ),
        "",
        "## Licence",
        "",
        f"That of the base model: {license_ or 'see its page'}.",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")


def base_license(directory: Path) -> str | None:
    """The licence that the card in a model directory names, if there is one."""
    path = directory / "README.md"
    return ModelCard.load(path).data.license if path.is_file() else None


def _facts(provenance: Mapping[str, Any]) -> list[str]:
    facts = provenance.get("facts", [])
    lines = [f"- {_plain(fact['prompt'])} → {_plain(fact['target'])}" for fact in facts[:SHOWN]]
    rest = len(facts) - len(lines)
    return [*lines, f"- and {rest} more"] if rest else lines or ["Not named in the edit."]


def _plain(text: str) -> str:
    return one_line(text).replace("<", "&lt;").replace("|", "\\|")


def _measured(metrics: Mapping[str, Any] | None) -> list[str]:
    """A table of the metrics with their intervals, and what they were measured on."""
    if metrics is None:
        return ["Not known: the edit is not that of the project's last run."]
    before, after = metrics["before"], metrics["after"]
    rows = [
        {
            "metric": name,
            "before": f"{before[key]:.1f}",
            "after": f"{after[key]:.1f}",
            "95% interval": _interval(after, key),
            "meaning": meaning,
        }
        for key, name, meaning in ROWS
        if key in before and key in after
    ]
    said = f"On the prompts of the {after['records']} facts of the list, in percent of prompts:"
    return [said, "", *markdown_table(rows, text=(0, 4))]


def _interval(metrics: Mapping[str, Any], key: str) -> str:
    low, high = (metrics.get(f"{key}_{end}") for end in ("low", "high"))
    return "–" if low is None or high is None else f"{low:.1f} to {high:.1f}"


def _settings(provenance: Mapping[str, Any]) -> dict[str, Any]:
    settings = provenance.get("settings", {})
    return settings.get("hyperparameters", settings)
