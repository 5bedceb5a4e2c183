"""Tolaria: builds the model and its data, runs epochs, applies decisions, measures, checkpoints."""
