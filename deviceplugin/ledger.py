"""Which slot is whose, as the kubelet says, and what it was promised since. Pure."""
