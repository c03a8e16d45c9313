"""Who answers a request: the engine here, or servers elsewhere, in which order."""
