"""Bootstrap intervals of means over records."""

from collections.abc import Mapping, Sequence

import numpy as np

RESAMPLES = 2000
"""Draws of as many records as there are."""
_RECORDS_AT_ONCE = 1 << 24
"""Counts drawn at a time, which bounds the memory."""


def bootstrap_intervals(
    means: Mapping[str, np.ndarray],
    *,
    harmonic: Mapping[str, Sequence[str]],
    seed: int,
) -> dict[str, float]:
    """Percentile intervals (95 %) of means over records, as `<name>_low` and `<name>_high`.

    `means` holds one value a record under each name (records; NaN where a record has none), and
    the same records are drawn for all names. `harmonic` adds harmonic means of named means, for
    example `{"score": ("efficacy", "paraphrase", "neighborhood")}`. What no record has is left
    out. Equal arguments give equal intervals.
    """
    measured = {name: values for name, values in means.items() if not np.isnan(values).all()}
    drawn = _resampled_means(measured, seed)
    for name, parts in harmonic.items():
        if all(part in drawn for part in parts):
            with np.errstate(divide="ignore"):  # a part of 0 gives 1 / ∞ = 0
                drawn[name] = len(parts) / np.sum([1.0 / drawn[part] for part in parts], axis=0)
    intervals: dict[str, float] = {}
    for name, values in drawn.items():
        low, high = np.nanpercentile(values, [2.5, 97.5])
        intervals |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return intervals


def _resampled_means(means: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Mean of each name over each draw of records with replacement (resamples)."""
    if not means:
        return {}
    values = np.stack(list(means.values()), axis=1)
    known = ~np.isnan(values)
    counts = len(values)
    generator = np.random.default_rng(seed)
    parts, step = [], max(1, _RECORDS_AT_ONCE // counts)
    for start in range(0, RESAMPLES, step):
        shape = min(step, RESAMPLES - start)
        # How often each record is in a resample (resamples × records): its mean is a product.
        drawn = generator.multinomial(counts, np.full(counts, 1 / counts), size=shape)
        with np.errstate(invalid="ignore"):
            parts.append((drawn @ np.where(known, values, 0.0)) / (drawn @ known))
    return dict(zip(means, np.concatenate(parts).T, strict=True))
