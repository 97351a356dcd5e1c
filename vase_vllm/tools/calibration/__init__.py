"""The `calibrate` subcommand: what a model's queries are like before RoPE."""
