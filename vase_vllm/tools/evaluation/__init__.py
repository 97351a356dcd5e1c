"""The `evaluate` subcommand: what eviction costs a model, in the probabilities it gives."""
