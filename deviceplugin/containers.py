"""What the kubelet adds to a container that got slots. Pure."""
