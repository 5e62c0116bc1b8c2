"""The frozen teacher of a run, and what is computed from it before training: the classes' similarity."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wkd_jax import config as config_lib
from wkd_jax import interrelation
from wkd_jax.data.base import DataSet
from wkd_jax.interrelation import Interrelation
from wkd_jax.models import functional
from wkd_jax.training import build, checkpoint, processes, sharding, workdir
from wkd_jax.training.build import Network
from wkd_jax.training.progress import Progress
from wkd_jax.training.step import Frozen, named_key
from wkd_jax.types import Array, Batch, Normalisation, Params, Samples, Task


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

    def similarity(
        self,
        config: Mapping[str, Any],
        data: DataSet,
        directory: pathlib.Path,
        *,
        between_batches: Callable[[], None] = lambda: None,
        report: Callable[[str], None] | None = None,
    ) -> np.ndarray:
        """The class similarity [C, C] that the config's `interrelation` section asks for, the same on every process.

        Read from a file if the config names one; else found in the run's directory; else in the user's cache; else
        computed, one pass over images the teacher was trained on, without augmentation, on all devices, and left in the
        cache. Process 0 alone reads and writes these files, and holds what the matrix is computed from. Where the data
        set allows images that cannot be read, the next of their classes take their places; such a matrix is not left
        in the cache.

        Args:
          config: Resolved, of the run that wants it.
          data: Of that run.
          directory: Its work directory.
          between_batches: Called before each batch of the pass, on every process. May raise, on all of them alike.
          report: Told, in sentences, what a person may want to know, how much the matrix says included. None: written
            to standard error, by process 0.

        Raises:
          ValueError: If a file does not fit this run, the section asks for what the teacher does not have, or a class
            has too few images that can be read.
          OSError: If a file cannot be read or written.
        """
        spec, info, report = config_lib.interrelation(config["interrelation"]), self.network.info, report or _say
        data = self._training_data(config, data)
        task, of, samples = build.task(config, data), None, 0
        interrelation.structure.check_groups(spec["groups"], task.class_names)
        if interrelation.uses_features(spec):
            interrelation.check_name(spec["features"], info)
            # Where a pass over the data set finds the labels, one process's is enough.
            processes.first(lambda: len(task.samples().label))
            of = processes.everywhere(task.samples)
            samples = interrelation.count_samples(spec["samples_per_class"], of.label, task.class_names)
        record = interrelation.provenance(
            teacher=info.name,
            weights_hash=self.fingerprint,
            data=data.name,
            data_fingerprint=processes.everywhere(lambda: data.fingerprint),
            num_classes=info.num_classes,
            dtype=config["dtype"],
            spec=interrelation.relevant(spec, samples),
        )
        processes.agree("the content of the teacher's training images", record["data_fingerprint"])
        path = directory / workdir.INTERRELATION

        def keep(
            similarity: np.ndarray, origin: Mapping[str, Any], structure: Mapping[str, Any] | None = None
        ) -> np.ndarray:
            structure = structure or interrelation.structure.measure(similarity)
            interrelation.save(path, Interrelation(similarity, task.class_names, origin, structure))
            tell(structure, similarity)
            return similarity

        def tell(structure: Mapping[str, Any], similarity: np.ndarray) -> None:
            for sentence in interrelation.structure.sentences(structure, similarity, spec["groups"]):
                report(f"class similarity: {sentence}")

        def find() -> np.ndarray | None:
            if spec["file"]:
                named = interrelation.load_named(pathlib.Path(spec["file"]), task.class_names, record)
                return keep(named.similarity, {"file": spec["file"]}, named.structure)
            if path.exists():
                remedy = "delete it and it is computed again, or choose another work directory"
                return interrelation.load(path, record, remedy=remedy).similarity
            if spec["kind"] == "uniform":
                return keep(np.eye(info.num_classes, dtype=np.float32), record)
            if spec["kind"] == "classifier":
                kernel = self.network.arrays[info.classifier]
                return keep(interrelation.from_classifier(kernel, centred=spec["centred"]), record)
            cached = interrelation.cached.find(record, task.class_names, report)
            return cached if cached is None else keep(cached.similarity, record, cached.structure)

        def compute(features: np.ndarray) -> np.ndarray:
            try:
                similarity = interrelation.from_features(spec, features)
            except jax.errors.JaxRuntimeError as error:
                raise ValueError(
                    f"class similarity: the device of process 0 fails on class features {features.shape} "
                    f"({str(error).splitlines()[0][:300]}): lower interrelation.samples_per_class, or compute the "
                    "matrix on another machine and set interrelation.file"
                ) from error
            left = interrelation.structure.remainder(similarity)
            found = Interrelation(
                similarity, task.class_names, record, interrelation.structure.measure(similarity, left)
            )
            leave(found)
            try:
                stability = interrelation.structure.stability(
                    lambda features: interrelation.from_features(spec, features),
                    features,  # shuffled: no longer what the matrix was made from
                    similarity,
                    samples=samples,
                    paired=spec["kind"] == "cka",
                    left=left,
                )
            except (jax.errors.JaxRuntimeError, MemoryError) as error:  # of a measure, which training does not need
                why = str(error).partition("\n")[0][:300] or type(error).__name__
                report(f"class similarity: its stability is not measured ({why}); the matrix itself is kept and used")
            else:
                found = dataclasses.replace(found, structure={**found.structure, "stability": stability})
                leave(found)
            tell(found.structure, similarity)
            return similarity

        def leave(found: Interrelation) -> None:
            interrelation.save(path, found)
            if not lost:  # what is left for others is of the whole data set
                interrelation.cached.keep(found, report)

        shape = (info.num_classes, info.num_classes)
        similarity = _from_first(find, shape)
        if similarity is None:
            features, lost = self._features(config, data, task, of, samples, between_batches)
            if lost:
                report(
                    f"class similarity: {len(lost)} training samples cannot be read or do not exist, and the next of "
                    "their classes take their places"
                )
            similarity = _from_first(lambda: compute(features), shape)
        return interrelation.rescaled(similarity, spec["mean_distance"])

    def _training_data(self, config: Mapping[str, Any], data: DataSet) -> DataSet:
        """What the teacher was trained on: a student on fewer images takes nothing from the classes' relations."""
        own, run = (config_lib.identity(section)["data"] for section in (self.config, config))
        if own == run:
            return data
        section = dict(self.config["data"])
        if own["name"] == run["name"]:  # where images lie, and who decodes them, is this machine's business
            section |= {key: value for key, value in config["data"].items() if key not in run}
        return processes.everywhere(lambda: build.data_set(section))

    def _features(
        self,
        config: Mapping[str, Any],
        data: DataSet,
        task: Task,
        of: Samples,
        samples: int,
        between_batches: Callable[[], None],
    ) -> tuple[np.ndarray | None, list[int]]:
        """Class features of training images by all devices, see `interrelation.collect`; kept by process 0 alone."""
        mesh = sharding.make_mesh(config["mesh"])
        replicated = NamedSharding(mesh, PartitionSpec())
        arrays = _placed(self.network.arrays, mesh, config["sharding"])

        def forward(arrays: Any, batch: Batch) -> tuple[Array, Array, Array]:
            inputs = task.normalise(batch, self.network.normalisation)
            outputs = task.sample_outputs(self.network.structure.merge(arrays), inputs)
            features = interrelation.select(outputs, config["interrelation"]["features"], self.network.info)
            valid = batch.valid if outputs.valid is None else batch.valid[:, None] & outputs.valid
            return features, batch.index, valid

        step = jax.jit(sharding.on(mesh, forward), out_shardings=replicated)

        def read(rows: np.ndarray) -> Iterator[Batch]:
            batches = data.evaluation(
                "train",
                global_batch_size=config["global_batch_size"] // config["accumulation"],
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                rows=rows,
            )
            # A process that cannot read its part must not leave the others waiting for it.
            while (batch := processes.everywhere(lambda: next(batches, None))) is not None:
                between_batches()
                yield sharding.global_batch(batch, mesh)

        with Progress(len(task.class_names) * samples, description="class features") as progress:
            return interrelation.collect(
                lambda batch: step(arrays, batch),
                read,
                of,
                task.class_names,
                samples,
                keep=jax.process_index() == 0,
                progress=lambda done, total: progress.update(done, {}),
            )


def _placed(arrays: Params, mesh: Mesh, rules: Sequence[tuple[str, tuple[Any, ...]]]) -> Params:
    """A teacher's arrays on the devices, where the rules of a run put them, each process filling its own devices.

    Of the rules those are kept that decide where one of the arrays goes: the others are of the student and the methods.
    """
    names = [f"teacher/{name}" for name, array in arrays.items() if array.ndim]
    first = {next((n for n, rule in enumerate(rules) if re.search(rule[0], name)), None) for name in names}
    kept = [rule for n, rule in enumerate(rules) if n in first]
    shardings = sharding.place(Frozen({}, arrays, np.int32(0)), mesh, kept).teacher
    return {name: sharding.put(array, shardings[name]) for name, array in arrays.items()}


def _from_first(act: Callable[[], np.ndarray | None], shape: tuple[int, ...]) -> np.ndarray | None:
    """What `act` returns on process 0, float32 of `shape` or None, on every process; as are its errors."""
    found: list[np.ndarray | None] = []

    def run() -> bool:
        found.append(act())
        return found[0] is not None

    if not processes.first(run):
        return None
    if jax.process_count() == 1:
        return found[0]
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.broadcast_one_to_all(found[0] if found else np.zeros(shape, np.float32)))


def _say(message: str) -> None:
    if jax.process_index() == 0:
        sys.stderr.write(message + "\n")


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
        is damaged; if the weights are not of the network that the config names, or differ between processes; if its
        statistics are to be perturbed and cannot be.
      OSError: If the weights are not there, or cannot be downloaded.
    """

    def read() -> tuple[Network, Mapping[str, Any], list[str]]:
        if directory is None:
            network, notes = build.pretrained(config, data)
            return network, config, notes
        return *_student(config, directory, data), []

    network, origin, notes = processes.everywhere(read)
    identity = {**network.arrays, **_feeding(network.normalisation)}
    if config["teacher"]["perturb_statistics"]:
        seed, size = config["seed"], data.image_size
        # The recipe and not its result, whose last bits depend on the hardware.
        identity["perturbed by an image of"] = np.array([seed, *size], np.int64)
        network = _perturbed(network, seed, size)
        notes.append(
            "its running statistics were moved once towards those of a normal random image "
            "(teacher.perturb_statistics), its parameters are as they were"
        )
    fingerprint = interrelation.hash_arrays(identity)
    processes.agree("the teacher", fingerprint)
    return Teacher(network, origin, fingerprint, tuple(notes))


def _student(config: Mapping[str, Any], directory: pathlib.Path, data: DataSet) -> tuple[Network, Mapping[str, Any]]:
    """The student of the run in `directory`, and that run's config."""
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
    return network, trained.config


def _feeding(normalisation: Normalisation) -> dict[str, np.ndarray]:
    return {"mean": np.asarray(normalisation.mean), "std": np.asarray(normalisation.std)}


def _perturbed(network: Network, seed: int, size: tuple[int, int]) -> Network:
    """The network after one training pass of one image of standard normal noise: its running statistics have moved.

    The authors' code does this to a teacher, unseeded, when it asks for the shapes of its features.

    Raises:
      ValueError: If the network has no running statistics, or takes none of a single image of this size.
    """
    key = named_key(jax.random.key(seed), "teacher/perturb_statistics")
    noise = jax.random.normal(key, (1, *size, 3))

    def run(arrays: Params, image: Array) -> Params:
        module = network.structure.merge(arrays)
        module(image, train=True, rngs=nnx.Rngs(key))  # for dropout, if there is some
        return functional.variables(module)

    try:
        moved = jax.device_get(jax.jit(run)(jax.device_put(network.arrays), noise))
    except ValueError as error:
        raise ValueError(f"teacher.perturb_statistics: {error}") from error
    if not moved:
        raise ValueError(
            f"teacher.perturb_statistics: {network.info.name} has no running statistics that could move: leave it out"
        )
    if jax.process_count() > 1:  # their last bits may differ
        with jax.transfer_guard("allow"):
            moved = multihost_utils.broadcast_one_to_all(moved)
    return dataclasses.replace(network, arrays={**network.arrays, **moved})
