"""Edit thousands of facts in a language model: the method, torch in and torch out."""
