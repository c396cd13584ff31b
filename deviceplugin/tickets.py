"""What the pods of the node ask for, and what the scheduler gave them. Pure."""
