"""What a person types: the console script, params.yaml, and the checks before a run."""
