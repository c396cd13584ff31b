"""Which slots a container gets, or why it gets none. Pure."""
