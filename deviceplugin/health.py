"""When a GPU is unhealthy, and healthy again. Pure."""
