"""Step 3: sample the contexts before each prompt, once, from the unedited model.

Result: `artifacts/prefixes.json`.
"""

from flows.service.step import Run, step
from tasks.engine.results import PREFIXES_FILE
from tasks.prefixes import draw_prefixes


@step("prefixes", reads=("model",))
def prefixes(run: Run) -> None:
    """Sample the prefixes, or find those that were sampled with this model and seed."""
    sampled = run.compute(draw_prefixes, run.model, run.parameters.prefixes.seed)
    run.write_json(PREFIXES_FILE, {"prefixes": sampled})
