"""Kubernetes as it is: a client, watched copies of objects, and the Lease. What they mean is for others to say.

`kubernetes.aio` gives configuration, credentials, TLS and transport. Its generated models are not used (they would
multiply the memory of 10,000 pods), nor its informer and leader election (`reflector`, `lease` say why).
"""
