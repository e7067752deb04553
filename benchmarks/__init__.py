"""Times every step against the literal oracle and against what the machine could do."""
