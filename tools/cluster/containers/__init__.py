"""A Kubernetes cluster whose pods are containers: kind's, or one built from source."""
