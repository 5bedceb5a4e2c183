"""A node without containers: what a kubelet does for a pod, done with processes and folders."""
