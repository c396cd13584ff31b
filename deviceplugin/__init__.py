"""The node agent: offers each physical GPU of its node as slots (virtual GPUs), and keeps that true.

What is decided (allocate, ledger, tickets, containers, health, policies, objects) is pure; what talks to the kubelet
(server, podresources), to NVML (inventory), to MPS (mps) and to the disk (checkpoint) is thin; `agent` puts it all
together.
"""
