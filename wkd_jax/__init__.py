"""Knowledge distillation in JAX. `from wkd_jax import losses` is all a foreign training loop needs."""

__version__ = "0.1.0"
