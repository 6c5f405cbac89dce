"""The comparison: initialisations x tasks x regimes x folds x repeats, resumable, under one protocol."""
