"""Which policy a GPU is shared by. Pure."""
