"""Custom kernels: each one op, one reference, one body a target."""
