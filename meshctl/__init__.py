"""meshctl: sends every inference request, by its batch size, to the GPU that answers it within the SLO."""

import os

# The solver's matrices are tiny: OpenBLAS's threads only spin beside it (twice the CPU for the same time alone, and
# ten times the time on a busy machine). Read once, when numpy is first imported; an operator's own setting wins.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

__version__ = "0.1.0"
