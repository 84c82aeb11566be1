"""How good pictures are: per-image fidelity, and distances between sets of pictures in a named network's features."""
