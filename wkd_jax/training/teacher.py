"""The frozen teacher of a run, and what is computed from it before training: the classes' similarity."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from wkd_jax import config as config_lib
from wkd_jax import interrelation
from wkd_jax.data.base import DataSet
from wkd_jax.models import functional
from wkd_jax.training import build, checkpoint, sharding, workdir
from wkd_jax.training.build import Network
from wkd_jax.training.progress import Progress
from wkd_jax.types import Batch, Normalisation


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained network.

    Attributes:
      network: Structure and arrays.
      config: Of the run that made it.
      fingerprint: Of its arrays and of how it is fed.
    """

    network: Network
    config: Mapping[str, Any]
    fingerprint: str

    def similarity(self, config: Mapping[str, Any], data: DataSet, directory: pathlib.Path) -> np.ndarray:
        """The class similarity [C, C] that the config's `interrelation` section asks for.

        Read from a file if the config names one; else found in the run's directory; else computed, one pass over the
        images the teacher was trained on, without augmentation, and kept there.

        Raises:
          ValueError: If a file does not fit this run, or the section asks for what the teacher does not have.
        """
        spec, info = interrelation.check(config["interrelation"]), self.network.info
        path = directory / workdir.INTERRELATION
        if self.config["data"] != config["data"]:  # a student on fewer images takes nothing from the classes' relations
            data = build.data_set(self.config["data"])
        samples = 0  # a classifier's rows need none
        if spec["kind"] != "classifier" and not spec["file"]:
            interrelation.check_name(spec["features"], info)
            samples = interrelation.count_samples(spec["samples_per_class"], data.labels, data.class_names)
        record = interrelation.provenance(
            teacher=info.name,
            weights_hash=self.fingerprint,
            data=data.name,
            data_fingerprint=data.fingerprint,
            num_classes=info.num_classes,
            spec=interrelation.relevant(spec, samples),
        )
        if spec["file"]:
            file = pathlib.Path(spec["file"])
            found = interrelation.load_file(file, data.class_names)
            if file.suffix == ".npz":  # one of ours says what made it, and that must be this teacher
                interrelation.load(file, {**record, "spec": interrelation.load(file).provenance.get("spec")})
            interrelation.save(path, interrelation.Interrelation(found, data.class_names, {"file": spec["file"]}))
            return found
        if path.exists():
            return interrelation.load(path, record).similarity
        if spec["kind"] == "classifier":
            similarity = interrelation.from_classifier(np.asarray(self.network.arrays[info.classifier]))
        else:
            similarity = interrelation.from_features(spec, self._features(config, data, samples))
        interrelation.save(path, interrelation.Interrelation(similarity, data.class_names, record))
        return similarity

    def _features(self, config: Mapping[str, Any], data: DataSet, samples: int) -> np.ndarray:
        """Class features [C, N, D] of the training images, on all devices."""
        mesh = sharding.make_mesh(config["mesh"])
        replicated = NamedSharding(mesh, PartitionSpec())
        task = build.task(config, data)
        arrays = jax.device_put(self.network.arrays, replicated)

        def forward(arrays: Any, image: jax.Array) -> jax.Array:
            rows = jnp.zeros(len(image), jnp.int32)
            batch = Batch(image=image, label=rows, index=rows, valid=rows == 0)
            batch = task.normalise(batch, self.network.normalisation)
            outputs = self.network.structure.merge(arrays)(batch.image, train=False)
            return interrelation.select(outputs, config["interrelation"]["features"], self.network.info)

        step = jax.jit(forward, out_shardings=replicated)
        batches = data.evaluation("train", global_batch_size=config["global_batch_size"])
        with Progress(len(data.class_names) * samples, description="class features") as progress:
            return interrelation.collect(
                lambda image: step(arrays, sharding.global_batch(image, mesh)),
                batches,
                num_classes=len(data.class_names),
                samples_per_class=samples,
                progress=lambda done, total: progress.update(done, {}),
            )


def load(config: Mapping[str, Any], directory: pathlib.Path, data: DataSet) -> Teacher:
    """The student of an earlier run, as a teacher.

    Args:
      config: Resolved, of the run that wants the teacher.
      directory: The earlier run's work directory.
      data: Of the run that wants the teacher.

    Raises:
      ValueError: If the directory holds no run, an unfinished one, one on images of another size, or its checkpoint
        is damaged.
    """
    if not (directory / workdir.CONFIG).exists():
        raise ValueError(f"teacher: {directory} holds no run (no {workdir.CONFIG}): train one there first")
    if not workdir.finished(directory):
        raise ValueError(f"teacher: the run in {directory} is not finished: run its config again to go on with it")
    earlier = workdir.read_json(directory / workdir.RESULT)
    try:
        tree, _ = checkpoint.read(directory / workdir.CHECKPOINTS, which=config["teacher"]["which"])
    except checkpoint.CheckpointError as error:
        raise ValueError(
            f"teacher: {error}. To repeat the end of its training, remove the damaged folder and "
            f"{directory / workdir.RESULT}, and run again"
        ) from error
    arrays = functional.under({**tree["params"], **tree["variables"], **tree["ema"]}, "student")
    size = tuple(earlier["image_size"])
    if size != data.image_size:
        raise ValueError(f"teacher: {directory} was trained on images of {size}, the data set has {data.image_size}")
    normalisation = Normalisation(tuple(earlier["mean"]), tuple(earlier["std"]))
    made_by = config_lib.resolve(earlier["config"])
    network = build.network(made_by["student"], earlier["num_classes"], config["dtype"], arrays, normalisation)
    identity = {**arrays, "mean": np.asarray(earlier["mean"]), "std": np.asarray(earlier["std"])}
    return Teacher(network, made_by, interrelation.hash_arrays(identity))
