"""The real Kubernetes and the real Istio, as plain processes on loopback, and what is tested on them."""
