"""A small teacher and its images; as a program, one of several processes: `python small_teacher.py DIRECTORY`."""

import dataclasses
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wkd_jax import config as config_lib
from wkd_jax.data.memory import MemoryDataSet, Split
from wkd_jax.models import functional
from wkd_jax.models.layers import BatchNorm, Conv
from wkd_jax.training import processes, teacher
from wkd_jax.training.build import Network
from wkd_jax.types import ModelInfo, Normalisation, Outputs, Tap

NAMES = ("ant", "bee", "cat", "dog")


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = Conv(3, 6, 3, stride=2, padding=1, rngs=rngs)
        self.norm = BatchNorm(6)
        self.fc = nnx.Linear(6, len(NAMES), rngs=rngs)
        self.info = ModelInfo("net", len(NAMES), {"stage1": Tap(6, 2)}, 6, "fc/kernel")

    def __call__(self, image, *, train, rngs=None):
        tap = self.norm(self.conv(image), train=train)
        pooled = jnp.mean(nnx.relu(tap), (1, 2))
        return Outputs(self.fc(pooled), {"stage1": tap}, pooled)


@dataclasses.dataclass(frozen=True, eq=False)
class Images(MemoryDataSet):
    """Random images, some of which cannot be read, or end the pass. Counts what is read."""

    bad: tuple = ()
    broken: tuple = ()
    read: list = dataclasses.field(default_factory=list)

    def evaluation(self, split, **arguments):
        for batch in super().evaluation(split, **arguments):
            self.read.extend(batch.index[batch.valid].tolist())
            if np.isin(batch.index[batch.valid], self.broken).any():
                raise OSError("a disk broke")
            bad = np.isin(batch.index, self.bad)
            yield dataclasses.replace(
                batch, valid=batch.valid & ~bad, image=np.where(bad[:, None, None, None], 0, batch.image)
            )


def images(**faults):
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (60, 8, 8, 3), np.uint8), rng.permutation(60).astype(np.int32) % len(NAMES))
    return Images("images", NAMES, split, split, (0.5,) * 3, (0.3,) * 3, **faults)


def settings(**changes):
    base = {"data": {"name": "digits"}, "student": {"name": "resnet8"}, "global_batch_size": 16}
    return config_lib.resolve({**base, **changes})


@functools.cache
def network():
    net = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    structure, params, variables, _ = functional.split(net)
    rng = np.random.default_rng(1)  # and not JAX's, whose compilation takes longer than all the rest
    arrays = {name: rng.uniform(-1, 1, leaf.shape).astype(np.float32) for name, leaf in {**params, **variables}.items()}
    arrays["norm/var"] = np.abs(arrays["norm/var"]) + 0.5
    return Network(structure, arrays, net.info, Normalisation((0.4,) * 3, (0.2,) * 3))


def make(config):
    return teacher.Teacher(network(), config, "fingerprint")


MESH = {"mesh": {"data": 4, "model": 2}, "sharding": (("fc/kernel", (None, "model")), ("student/", ("model",)))}
CONFIG = settings(**MESH, interrelation={"samples_per_class": 12})
BAD = {"unreadable": (2, 3, 30), "whole": ()}  # some of each process; the first is not left in the cache


def main(directory):
    processes.initialize()
    made, last, result = make(CONFIG), jax.process_index() == 1, {}

    def attempt(name, data, config=CONFIG, **arguments):
        folder = pathlib.Path(directory) / name
        if name != "cannot be written" and not last:
            folder.mkdir()
        processes.gather("the folder is there")
        try:
            result[name] = made.similarity(config, data, folder, **arguments).tolist()
        except (ValueError, OSError, KeyboardInterrupt) as error:
            result[name] = f"{type(error).__name__}: {error}"
        result[f"{name}: read"] = data.read

    def stop():
        raise KeyboardInterrupt("stop")

    moved = teacher._perturbed(network(), 0, (8, 8)).arrays
    result["perturbed"] = {name: moved[name].tolist() for name in ("norm/mean", "norm/var")}
    with jax.transfer_guard("disallow"):
        attempt("cannot be written", images(), settings(interrelation={"kind": "classifier"}))
        attempt("broken on one", images(broken=range(60) if last else ()))
        attempt("stopped", images(), between_batches=stop)
        attempt("unreadable", images(bad=BAD["unreadable"]))
        attempt("whole", images())
        attempt("cached", images())
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
