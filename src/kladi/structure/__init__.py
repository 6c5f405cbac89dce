"""What the data knows: label trees, label sets, and (later) lattices and topology. NumPy values, frozen."""
