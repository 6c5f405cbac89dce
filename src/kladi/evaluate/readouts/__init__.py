"""How a frozen representation is asked: linear probe, neighbours, prototypes, all folds at once."""
