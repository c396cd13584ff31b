"""The scheduler extender: kube-scheduler asks it which node, and which physical GPUs of it, a pod gets.

`wire` and `server` are the HTTP edge, `pods` and `gpus` read objects, `ledger` knows who has what, `binder` writes
bindings. What is decided is decided in `meshctl.core.packing`.
"""
