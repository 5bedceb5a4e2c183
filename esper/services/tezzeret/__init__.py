"""Tezzeret, the forge: from a blueprint to a validated, measured and packaged kernel."""
