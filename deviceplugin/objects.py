"""The GPU object of a GPU. Pure."""
