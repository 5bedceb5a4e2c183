"""What people and tests run beside Esper; no part of the distribution."""
