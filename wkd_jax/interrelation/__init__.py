"""Category interrelations: how alike a teacher finds the classes, from its features on the training set.

    count = count_samples(spec["samples_per_class"], samples.label, class_names)
    features, lost = collect(apply, read, samples, class_names, count)                # [C, N, D]
    similarity = from_features(spec, features)                                        # [C, C]
    structure.measure(similarity)                                                     # is it about pairs at all?
    save(path, Interrelation(similarity, class_names, provenance(...)))
    load(path, expected=provenance(...))                                              # in the same run, later
    cached.keep(Interrelation(...), report); cached.find(provenance(...), ...)        # in another run

`losses.ground_cost` turns the similarity into the cost of WKD-L. The package imports `losses`, `evaluation` and
the modules at the bottom (`config`, `types`, `cache`, `registry`), never `training`.
"""

from wkd_jax.evaluation import structure
from wkd_jax.interrelation import cached
from wkd_jax.interrelation.features import check_name, collect, count_samples, select
from wkd_jax.interrelation.similarity import from_classifier, from_features, relevant, rescaled, uses_features
from wkd_jax.interrelation.store import (
    Interrelation,
    digest,
    hash_arrays,
    load,
    load_distance,
    load_file,
    load_named,
    provenance,
    save,
)

__all__ = [
    "Interrelation",
    "cached",
    "check_name",
    "collect",
    "count_samples",
    "digest",
    "from_classifier",
    "from_features",
    "hash_arrays",
    "load",
    "load_distance",
    "load_file",
    "load_named",
    "provenance",
    "relevant",
    "rescaled",
    "save",
    "select",
    "structure",
    "uses_features",
]
