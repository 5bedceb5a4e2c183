"""A Kubernetes control plane, and a node that runs pods as processes: no root, no containers."""
