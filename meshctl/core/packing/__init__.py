"""Which node, and which physical GPUs of it, a pod gets. Pure: no I/O, no clock, and no randomness but a given seed.

`vocabulary` has the words and `fleet` is the door. It knows who has what (`state`), and keeps for equal demands
(`shape`) where they fit (`fit`), at what cost (`scoring`: what a policy is; `stranding` is the default, `peers` are
others to compare with) and why not (`reasons`). `preempt` says who must go, `defrag` which pods could move so that more
fits.
"""
