"""A synthetic world and the small model that knows it, for tests and controlled studies."""
