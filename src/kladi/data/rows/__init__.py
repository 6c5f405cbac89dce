"""Hop 0: a manifest, a folder or a DICOM folder -> checked rows. Names become ids here, once."""
