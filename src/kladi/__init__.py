"""kladi: pretrain image encoders with the structure that medical data already carries."""

__version__ = "0.1.0"
