"""The bus: its port and what stands behind it; `esper.services.oona_client` gives the names."""
