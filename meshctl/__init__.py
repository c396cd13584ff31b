"""meshctl: sends every inference request, by its batch size, to the GPU that answers it within the SLO."""

__version__ = "0.1.0"
