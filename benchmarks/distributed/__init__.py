"""Time, memory and traffic of the sharded loss on several processes."""
