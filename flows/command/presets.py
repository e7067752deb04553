"""The settings that are known for models, as a table."""

from rich.box import SIMPLE
from rich.table import Table

from memit.hyperparameters import presets


def presets_table() -> Table:
    """A row for each preset: a model, its layers and λ, whether it was checked, and its source."""
    table = Table(box=SIMPLE)
    for name in ("model", "layers", "λ", "checked", "source"):
        table.add_column(name, justify="right" if name == "λ" else "left")
    for one in presets():
        layers, weight = one.settings.layers, f"{float(one.settings.covariance_weight):,g}"
        checked = "yes" if one.checked else "no"
        table.add_row(one.models[0], f"{layers[0]}–{layers[-1]}", weight, checked, one.source)
    return table
