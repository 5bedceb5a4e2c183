"""Tamiyo, the controller: packets in, one decision each out."""
