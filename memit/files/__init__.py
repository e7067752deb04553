"""Files: written atomically, read with limits, tensors and checkpoints."""
