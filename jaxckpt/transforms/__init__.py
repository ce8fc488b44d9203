"""JAX transforms: from a plan to a differentiable function."""
