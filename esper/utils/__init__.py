"""Adapters to what lies outside: storage and logs."""
