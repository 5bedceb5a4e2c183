"""Urza, the hub: blueprints, kernels and sessions, in a database and an object store."""
