"""The operator: what was applied with kubectl trains as Jobs, and its state shows in status."""
