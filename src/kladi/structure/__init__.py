"""What the data knows: label trees, label sets, topology, lattices of modalities. NumPy values, frozen."""
