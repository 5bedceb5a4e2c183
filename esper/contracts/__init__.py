"""Data that crosses a boundary: pydantic only, no torch, no database, no network."""

API_VERSION = "v1"
