"""Knowledge distillation in JAX. `from wkd_jax import losses` is all a foreign training loop needs."""

import sys

__version__ = "0.1.0"

# As `python -m wkd_jax.main` starts: a command that does not find what it imports says what to install.
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].startswith("wkd_jax"):
    from wkd_jax import extras

    extras.explain()
