"""One-pass maps: a network that turns plain noise into samples of one condition."""
