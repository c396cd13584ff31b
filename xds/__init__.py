"""The data plane edge: a Plan becomes xDS resources, and real Envoys fetch them from our ADS server.

`translate`, `snapshot`, `subscription` and `intrange` are pure: data in, data out. `cache` holds what is published,
`server` speaks gRPC. Nothing here decides where traffic goes.
"""
