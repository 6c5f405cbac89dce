"""What we optimise: a function first, then a thin module; usable in anyone's loop."""
