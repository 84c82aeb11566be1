"""A package, so that `tests` means these wherever a dependency brings a `tests` of its own."""
