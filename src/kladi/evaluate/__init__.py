"""What it bought: embeddings, probes, metrics, statistics."""
