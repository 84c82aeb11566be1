"""What is learned: plain functions from tensors to a scalar, each with its equation; they know no model and no data."""
