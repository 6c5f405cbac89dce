"""What is kept of an evaluation: results.json and what its report draws, for its owner alone."""
