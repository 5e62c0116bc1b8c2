"""From the name of a file of weights (a path, a URL, or a published file's name) to the arrays of a network."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
from flax import nnx
from safetensors.numpy import save_file

from wkd_jax import registry
from wkd_jax.models import functional
from wkd_jax.models.base import Network
from wkd_jax.types import Normalisation, Params
from wkd_jax.weights import detectron, match, select, state
from wkd_jax.weights.download import fetch
from wkd_jax.weights.errors import WeightsError
from wkd_jax.weights.public import PUBLIC, by_hash
from wkd_jax.weights.state import State

NATIVE_FILE = "weights.safetensors"  # in the directory that an import makes
SUFFIXES = (".pth", ".pt", ".pkl", ".npz", ".safetensors")
_RECORD = "wkd_jax"  # key, in the metadata of such a file, of what it says about itself
IMAGE_SIZE, NORMALISATION = "image_size", "normalisation"  # keys of the metadata of an export for PyTorch


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """A file of weights, read but not yet matched with a network.

    Attributes:
      source: As it was asked for.
      sha256: Of the file.
      state: Its arrays, by its own keys.
      model: Section of a config, {"name": ..., settings}, of the network that it says it is of; empty if it does not.
      normalisation: How that network wants its images; None if the file does not say.
      image_size: (height, width) of the images that it is built for; None if any, or if the file does not say.
      style: Whose keys, where the source says so; "": to be found out.
    """

    source: str
    sha256: str
    state: State
    model: Mapping[str, Any]
    normalisation: Normalisation | None
    image_size: tuple[int, int] | None
    style: str = ""

    def arrays(self, model: Network, *, reset_head: bool = False, whole: bool = True) -> tuple[Params, list[str]]:
        """The arrays of `model`, which may be abstract (`nnx.eval_shape`).

        Args:
          model: The network.
          reset_head: Leave the classifier out, whatever its class count in the file.
          whole: Whether a file of the trunk alone is refused, where the network has one.

        Returns:
          (arrays, notes): float32 NumPy by our names, without the classifier's if it was left out, of the trunk alone
          if the file has no more; sentences about everything that was not a plain copy.

        Raises:
          WeightsError: If the file is not of this network; lists what is missing, left over and of another shape, and
            names the network that it looks like.
        """
        fit = self._fit(model)
        arrays, notes = match.convert(fit, model, self.source, reset_head=reset_head, grid=self._grid(model))
        if fit.trunk and whole:
            raise WeightsError(
                f"{self.source}: holds the trunk of {model.info.name} alone. It serves as init.weights of a network to "
                "be trained"
            )
        eps = self.model.get("norm_eps")
        if None not in (eps, model.norm_eps) and eps != model.norm_eps:
            raise WeightsError(
                f"{self.source}: was made with norm_eps={eps}, and {model.info.name} is built with "
                f"norm_eps={model.norm_eps}, which changes what it computes: set norm_eps={eps} in the section of the "
                "network"
            )
        remarks = model.remarks(fit.style, fit.trunk, self.model)
        return arrays, [*self.state.notes, f"keys of {fit.style}", *notes, *remarks]

    def _fit(self, model: Network) -> match.Fit:
        native = _RECORD in self.state.metadata
        if native and self.style:
            raise WeightsError(f"{self.source}: has the names of this package: leave style={self.style} out")
        return match.best(self.state.arrays, model, native=native, style=self.style)

    def _grid(self, model: Network) -> tuple[int, int] | None:
        """The grid of patches that the file's position embeddings are for, if it says so."""
        if not self.image_size:
            return None
        stride = model.info.taps[model.info.last_tap].stride
        return self.image_size[0] // stride, self.image_size[1] // stride

    def num_classes(self, model: Mapping[str, Any]) -> int | None:
        """Rows of the classifier that the file has, of a detector's the background's too; None for a trunk alone.

        Args:
          model: Section of a config, {"name": ..., settings}, of the network that it is of.

        Raises:
          WeightsError: If it is not of this network, or a classifier without its last layer.
        """
        module = match.abstract(model, 1000)
        fit = self._fit(module)
        match.check(fit, module, self.source, without_head=True, grid=self._grid(module))
        if fit.trunk:
            return None
        bias = fit.arrays.get(fit.entries[module.by_class[1]].key)
        if bias is None or bias.ndim != 1:
            raise WeightsError(
                f"{self.source}: has no classifier of {model['name']} to count classes by. Such a file serves as "
                "init.weights with init.reset_head=True"
            )
        return len(bias)


def open_file(source: str | os.PathLike[str]) -> WeightsFile:
    """Finds and reads a file of weights.

    Args:
      source: A name in `wkd_jax.weights.public.PUBLIC`, an https, http or gs URL (downloaded once and kept), a path, or
        a directory that `write` made; `wkd_jax.weights.select` says what may follow it behind #.

    Raises:
      WeightsError: If the file cannot be read; see `wkd_jax.weights.state.read`.
      OSError: If it is not there, or cannot be downloaded.
    """
    source = str(source)
    address, selection = select.split(source)
    public = PUBLIC.get(address) or next((entry for entry in PUBLIC.values() if entry.url == address), None)
    url = public.url if public else address
    path = fetch(url) if "://" in url else pathlib.Path(url).expanduser()
    if path.is_dir():
        path /= NATIVE_FILE
    if not path.is_file():
        raise FileNotFoundError(_not_found(address, path))
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    found = selection.apply(state.read(path), source)
    style = selection.style
    if public := public or by_hash(sha256):
        described = {"name": public.model, **public.settings}
        return WeightsFile(source, sha256, found, described, public.normalisation, None, style)
    try:
        model, normalisation, size = _described(found.metadata)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(
            f"{source}: what its metadata say of it cannot be read ({type(error).__name__}: {error}): import it again"
        ) from error
    normalisation = normalisation or detectron.normalisation(found.arrays, found.buffers, style)
    return WeightsFile(source, sha256, found, model, normalisation, size, style)


def _described(
    metadata: Mapping[str, str],
) -> tuple[dict[str, Any], Normalisation | None, tuple[int, int] | None]:
    """(model, normalisation, image size) that a file of ours tells of itself."""
    if _RECORD not in metadata:
        size, how = (json.loads(metadata.get(key, "null")) for key in (IMAGE_SIZE, NORMALISATION))
        return {}, _normalisation(how), _size(size)
    record = json.loads(metadata[_RECORD])
    model = {str(key): tuple(v) if isinstance(v, list) else v for key, v in record["model"].items()}
    return (
        {"name": str(model.pop("name")), **model},
        _normalisation(record["normalisation"]),
        _size(model.get(IMAGE_SIZE)),
    )


def _normalisation(how: Any) -> Normalisation | None:
    return how and Normalisation(tuple(map(float, how["mean"])), tuple(map(float, how["std"])))


def _size(value: Any) -> tuple[int, int] | None:
    return value and (int(value[0]), int(value[1]))


def restore(model: Network, source: str | os.PathLike[str], *, reset_head: bool = False) -> list[str]:
    """Puts the weights of a file into a network.

    Args:
      model: Its parameters and statistics are replaced.
      source: As in `open_file`.
      reset_head: Leave the classifier as it is, whatever its class count in the file.

    Returns:
      Sentences about everything that was not a plain copy.

    Raises:
      WeightsError: If the file cannot be read or is not of this network.
      OSError: If it is not there, or cannot be downloaded.

    Example:
      >>> import tempfile
      >>> from wkd_jax.models.resnet import ResNet
      >>> model, other = (ResNet("resnet18", 10, rngs=nnx.Rngs(seed)) for seed in (0, 1))
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = write(directory, model, {"name": "resnet18"}, Normalisation((0.5,) * 3, (0.25,) * 3))
      ...     notes = restore(other, directory)
      >>> bool((model.fc.kernel[...] == other.fc.kernel[...]).all())
      True
    """
    arrays, notes = open_file(source).arrays(model, reset_head=reset_head)
    functional.update(model, arrays)
    return notes


def write(
    directory: str | os.PathLike[str],
    arrays: Network | Mapping[str, Any],
    model: Mapping[str, Any],
    normalisation: Normalisation | None,
    **origin: Any,
) -> pathlib.Path:
    """Writes a network in our own names: a safetensors file that says which network it is and how it is fed.

    Keys are paths such as "layer1/0/conv1/kernel", arrays are in Flax's layouts.

    Args:
      directory: Made if it does not exist; an earlier file in it is replaced.
      arrays: The network, or its arrays by name.
      model: Section of a config, {"name": ..., settings}.
      normalisation: How the network wants its images; None if that is not known.
      origin: Whatever else the file should say about itself, as JSON.

    Returns:
      Path of the file.
    """
    if isinstance(arrays, nnx.Module):
        _, params, variables, _ = functional.split(arrays)
        arrays = {**params, **variables}
    path = pathlib.Path(directory) / NATIVE_FILE
    how = normalisation and dataclasses.asdict(normalisation)
    record = {"model": dict(model), "normalisation": how, **origin}
    write_file(path, {name: np.asarray(array) for name, array in arrays.items()}, {_RECORD: json.dumps(record)})
    return path


def write_file(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file.

    Raises:
      OSError: If it cannot be written; nothing is left of it then.
    """
    with replacing(path) as temporary:
        try:
            save_file(dict(arrays), temporary, dict(metadata))
        except safetensors.SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A temporary name to write a file under; it gets its own when it is whole, and is removed otherwise.

    Raises:
      OSError: If the name is that of a folder, or the folder it is in cannot be made.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _not_found(source: str, path: pathlib.Path) -> str:
    if path.name == NATIVE_FILE and path.parent.is_dir():
        return f"{source}: the directory has no {NATIVE_FILE}: give the file itself"
    if "/" in source or path.suffix in SUFFIXES:
        return f"{source}: there is no such file"
    return registry.unknown("weights (neither a file nor a published name)", source, PUBLIC)
