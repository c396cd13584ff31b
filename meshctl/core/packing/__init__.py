"""Which node, and which physical GPUs of it, a pod gets. Pure: no I/O, no clock, and no randomness but a given seed.

`vocabulary` has the words, `fleet` the state and the choice, `peers` other policies to compare with, `preempt` who
must go, `defrag` which pods could move so that more fits.
"""
