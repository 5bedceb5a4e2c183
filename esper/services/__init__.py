"""The services: they know each other only through contracts, Oona messages and clients."""
