"""The embedded default: a synthetic world and the small model that knows it."""
