"""How one step runs: cached, in pieces, with progress."""
