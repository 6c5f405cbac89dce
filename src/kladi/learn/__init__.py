"""How it learns: objectives, one readable loop, checkpoints."""
