"""Real facts of common knowledge, counterfactual edits of them, and a text for the perplexity."""
