"""Before and after: how well a checkpoint answers."""
