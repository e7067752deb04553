"""The model card of an exported edit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData

from tasks.reporting.formats import STRICT_LEGEND, escaped, markdown_table, rows

Kind = Literal["merged", "lora", "delta"]

LIBRARIES = {"merged": "transformers", "lora": "peft", "delta": "memit"}
"""What loads each kind of export."""
SHOWN = 20
"""Facts that a card names."""


def make_card(
    kind: Kind,
    provenance: Mapping[str, Any],
    license_: str | None,
    metrics: Mapping[str, Any] | None,
    note: str = "",
) -> ModelCard:
    """A card from a delta's provenance, the licence of the base model, and the metrics of the run,
    where they are known; `note` is about the export."""
    data = ModelCardData(
        base_model=provenance["model"],
        license=license_,
        library_name=LIBRARIES[kind],
        tags=["memit", "model-editing"],
    )
    facts, settings = provenance.get("facts", []), provenance.get("settings", {})
    named = [[escaped(fact[key]) for key in ("prompt", "target")] for fact in facts[:SHOWN]]
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card.md")),
        kind=kind,
        edit=provenance,
        facts=named,
        more=len(facts) - len(named),
        table=markdown_table(rows(metrics, intervals=True), text=(0, 6)) if metrics else [],
        legend=STRICT_LEGEND,
        settings=settings.get("hyperparameters", settings),
        note=note,
    )
