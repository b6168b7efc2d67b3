"""Training of the small face generator that the engine samples from."""
