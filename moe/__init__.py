"""Sparse-expert Transformers in JAX: routers, dispatch, sharding, training and measurement."""
