"""From a checked call to the kernels: plan, chunk loops around the matmuls, ops, autograd."""
