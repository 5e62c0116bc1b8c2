"""The frozen teacher of a run, and what is computed from it before training: the classes' similarity."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

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
from wkd_jax.types import Batch, Normalisation, Params


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained network.

    Attributes:
      network: Structure and arrays.
      config: Of the run that made it; of the run that uses it where its weights came from elsewhere.
      fingerprint: Of its arrays and of how it is fed.
      notes: What happened to its weights on the way in, a sentence each.
    """

    network: Network
    config: Mapping[str, Any]
    fingerprint: str
    notes: tuple[str, ...] = ()

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


@dataclasses.dataclass(frozen=True)
class Trained:
    """The student of a finished run.

    Attributes:
      config: Resolved, of the run.
      num_classes: C.
      image_size: (height, width) of its images, pixels.
      normalisation: Of its images.
      arrays: Its parameters and statistics; the moving averages where the run kept some.
    """

    config: Mapping[str, Any]
    num_classes: int
    image_size: tuple[int, int]
    normalisation: Normalisation
    arrays: Params


def read_run(directory: pathlib.Path, which: Literal["latest", "best"]) -> Trained:
    """The student of an earlier run.

    Args:
      directory: The run's work directory.
      which: Latest or best checkpoint.

    Raises:
      ValueError: If the directory holds no run, an unfinished one, or its checkpoint is damaged.
    """
    if not (directory / workdir.CONFIG).exists():
        raise ValueError(f"{directory} holds no run (no {workdir.CONFIG}): train one there first")
    if not workdir.finished(directory):
        raise ValueError(f"the run in {directory} is not finished: run its config again to go on with it")
    result = workdir.read_json(directory / workdir.RESULT)
    try:
        tree, _ = checkpoint.read(directory / workdir.CHECKPOINTS, which=which)
    except checkpoint.CheckpointError as error:
        raise ValueError(
            f"{error}. To repeat the end of its training, remove the damaged folder and "
            f"{directory / workdir.RESULT}, and run again"
        ) from error
    return Trained(
        config=config_lib.resolve(result["config"]),
        num_classes=result["num_classes"],
        image_size=tuple(result["image_size"]),
        normalisation=Normalisation(tuple(result["mean"]), tuple(result["std"])),
        arrays=functional.under({**tree["params"], **tree["variables"], **tree["ema"]}, "student"),
    )


def load(config: Mapping[str, Any], directory: pathlib.Path | None, data: DataSet) -> Teacher:
    """The teacher of a run: the student of an earlier one, or a network whose weights somebody else trained.

    Args:
      config: Resolved, of the run that wants the teacher.
      directory: The earlier run's work directory; None where `teacher.weights` says where the teacher is.
      data: Of the run that wants the teacher.

    Raises:
      ValueError: If the directory holds no run, an unfinished one, one on images of another size, or its checkpoint
        is damaged; if the weights are not of the network that the config names.
      OSError: If the weights are not there, or cannot be downloaded.
    """
    if directory is None:
        network, notes = build.pretrained(config, data)
        return Teacher(network, config, _fingerprint(network), tuple(notes))
    try:
        trained = read_run(directory, config["teacher"]["which"])
    except ValueError as error:
        raise ValueError(f"teacher: {error}") from error
    size = trained.image_size
    if size != data.image_size:
        raise ValueError(f"teacher: {directory} was trained on images of {size}, the data set has {data.image_size}")
    network = build.network(
        trained.config["student"], trained.num_classes, config["dtype"], trained.arrays, trained.normalisation
    )
    return Teacher(network, trained.config, _fingerprint(network))


def _fingerprint(network: Network) -> str:
    how = {"mean": np.asarray(network.normalisation.mean), "std": np.asarray(network.normalisation.std)}
    return interrelation.hash_arrays({**network.arrays, **how})
