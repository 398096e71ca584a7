"""What a run needs, before it is run: memory, operations, communication and time on named hardware."""
