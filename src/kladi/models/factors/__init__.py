"""Several modalities of one patient: globally shared, partially shared and private factors."""
