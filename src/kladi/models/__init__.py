"""What learns: encoders and heads."""
