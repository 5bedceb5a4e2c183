"""The manifests of what the operator makes, each a function of what it is made for."""
