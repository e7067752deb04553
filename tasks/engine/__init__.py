"""How any piece of work runs: cache, records, locks, store, workers, progress."""
