"""Finds out how a state dict fits a network: whose keys it has, what is wrapped around them, and what does not fit."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from wkd_jax import registry
from wkd_jax.models import functional
from wkd_jax.models.base import Network
from wkd_jax.types import Params
from wkd_jax.weights import keys, position
from wkd_jax.weights.errors import WeightsError
from wkd_jax.weights.keys import Entry
from wkd_jax.weights.select import COCO_ROWS

NATIVE = "wkd_jax"  # the style of files with our own names
TRUNK = "trunk/"  # what a detector has in common with an image classifier
# Put in front of all keys by wrappers of a network. A distiller's file has its other parts beside "student.".
_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "backbone.")
_STUDENT = "student."
_MOST_WRAPPERS = 6
_IN_DETECTORS = re.compile(r"^backbone\.(bottom_up|body)\.")  # what keys of a trunk begin with
_SHOWN = 4  # names of each kind in an error message


@dataclasses.dataclass(frozen=True)
class Fit:
    """One way to read a state dict as a network, or as the trunk of one.

    Attributes:
      style: Whose keys.
      trunk: "" for the whole network; for its trunk alone, the registered name of the network whose trunk it is.
      stripped: Prefixes that were taken off all keys, in order.
      entries: Of the wanted arrays, by our name.
      spare: Keys of the file for what an image classifier has beside the trunk.
      implied: Statistics that the file leaves out, since its scales and shifts are the whole normalisation.
      missing: Keys that the network has and the file has not.
      left_over: Keys of the file that the network has not.
      wrong: (our name, key, shape found, shape wanted).
      arrays: Of the file, by key, prefixes off.
    """

    style: str
    trunk: str
    stripped: tuple[str, ...]
    entries: dict[str, Entry]
    spare: tuple[str, ...]
    implied: Params
    missing: tuple[str, ...]
    left_over: tuple[str, ...]
    wrong: tuple[tuple[str, str, tuple[int, ...], tuple[int, ...]], ...]
    arrays: Mapping[str, np.ndarray]

    @property
    def problems(self) -> int:
        """How many arrays do not fit."""
        return len(self.missing) + len(self.left_over) + len(self.wrong)


def abstract(model: Mapping[str, Any], num_classes: int) -> Network:
    """The network of a config's section, {"name": ..., settings}, without values."""
    settings = {key: value for key, value in model.items() if key != "name"}
    return nnx.eval_shape(lambda: registry.get("models", model["name"])(num_classes, rngs=nnx.Rngs(0), **settings))


def shapes_of(model: Network) -> dict[str, tuple[int, ...]]:
    """Shapes of a network's parameters and statistics, by name. The network may be abstract."""
    _, params, variables, _ = functional.split(model)
    return {name: tuple(array.shape) for name, array in {**params, **variables}.items()}


def best(
    arrays: Mapping[str, np.ndarray], model: Network, *, native: bool = False, style: str = "", trunk: bool = True
) -> Fit:
    """The way of reading a state dict that leaves the fewest arrays over, on either side.

    Args:
      arrays: By the file's keys.
      model: The network, abstract or not.
      native: Whether the keys are our own names.
      style: Whose keys they are, where that is known; "": to be found out.
      trunk: Whether a trunk alone counts, where the network has one.

    Raises:
      ValueError: If the network has no such style.
    """
    shapes = shapes_of(model)
    if style and style not in type(model).KEY_STYLES:
        raise ValueError(registry.unknown(f"key style of {model.info.name}", style, type(model).KEY_STYLES))
    variants = [((), arrays)] if native else [*_unwrapped(arrays)]

    def found(readings: Iterable[_Reading]) -> list[Fit]:
        readings = [reading for reading in readings if style in ("", reading.style)]
        return [_fit(reading, *variant, model, shapes) for variant in variants for reading in readings]

    def rank(fit: Fit) -> tuple[int, int]:
        return fit.problems, len(fit.stripped)

    fit = min(found(_whole(model, shapes, native)), key=rank)
    if fit.problems and trunk and model.trunk_of:
        fit = min([fit, *found(_trunks(model, shapes, native))], key=rank)
    return fit


def check(fit: Fit, model: Network, source: str, *, without_head: bool, grid: position.Grid | None = None) -> list[str]:
    """Refuses a state dict that is not of a network.

    Args:
      fit: The best one.
      model: The network, abstract or not.
      source: Of the file, for messages.
      without_head: Whether the classifier may be missing or of another shape.
      grid: As in `convert`.

    Returns:
      Our names of the arrays that have to be resized.

    Raises:
      WeightsError: If anything is missing, left over or of another shape. One message: the first few of each, and the
        network that the file looks like.
    """
    skipped = _keys_by_class(fit, model) if without_head else set()
    found = {name: tuple(fit.arrays[entry.key].shape) for name, entry in fit.entries.items() if entry.key in fit.arrays}
    wanted = {name: entry.shape for name, entry in fit.entries.items()}
    resized = [
        name
        for name, shape in found.items()
        if name.endswith("pos_embed") and position.must_resize(shape, wanted[name], model.info, grid)
    ]
    missing = [key for key in fit.missing if key not in skipped]
    wrong = [row for row in fit.wrong if row[0] not in resized and row[1] not in skipped]
    if missing or fit.left_over or wrong:
        raise WeightsError(_message(source, fit, model, missing, wrong))
    return resized


def convert(
    fit: Fit, model: Network, source: str, *, reset_head: bool, grid: position.Grid | None = None
) -> tuple[Params, list[str]]:
    """The network's arrays out of a state dict.

    Args:
      fit: The best one.
      model: The network, abstract or not.
      source: Of the file, for messages.
      reset_head: Leave the classifier out, whatever the file has there.
      grid: (height, width) in patches that position embeddings of the file are for; None: a square, if they can be.

    Returns:
      (arrays, notes): float32, by our names, without the classifier if it was left out; a sentence for everything that
      was not a plain copy.

    Raises:
      WeightsError: As `check`, or if a value is not finite.
    """
    shapes, info, notes = shapes_of(model), model.info, []
    if fit.stripped:
        notes.append(f"took {', '.join(fit.stripped)} off the keys")
    resized = check(fit, model, source, without_head=reset_head, grid=grid)
    skipped = _keys_by_class(fit, model) if reset_head else set()
    result: dict[str, Any] = {}
    for name, entry in fit.entries.items():
        if entry.key in skipped:
            continue
        if name in fit.implied:
            result[name] = fit.implied[name]
            continue
        array = fit.arrays[entry.key]
        if not (np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"):
            raise WeightsError(f"{source}: {entry.key} holds {array.dtype}, not floating-point numbers")
        if name in resized:
            before = grid or position.square(array.shape[1], info)
            after = position.grid_of(info)
            notes.append(f"resized {name} from {before[0]} x {before[1]} patches to {after[0]} x {after[1]}")
            array = position.resize(array, info, before)
        if not np.all(np.isfinite(array.astype(np.float32))):
            raise WeightsError(
                f"{source}: {entry.key} has values that are not finite: the training that made it failed"
            )
        if fit.style == NATIVE:
            result[name] = np.ascontiguousarray(array, np.float32)
        else:
            result[name] = keys.from_torch(name, array, shapes[name], entry.steps)
    notes += dict.fromkeys(step.note for name in result for step in fit.entries[name].steps if step.note)
    if fit.implied:
        notes.append("its normalisation is a scale and a shift: mean 0, variance 1 less the eps")
    if fit.spare:
        notes.append(f"left out {_some(list(fit.spare))}: not of the trunk")
    if fit.trunk:
        others = sorted({name.split("/")[0] for name in shapes} - {TRUNK.rstrip("/")})
        of = f" of {fit.trunk}" if fit.trunk != info.name else ""
        notes.append(f"holds a trunk{of} alone: {', '.join(others)} start anew")
    elif reset_head:
        notes.append("the classifier starts anew")
    return result, notes


@dataclasses.dataclass(frozen=True)
class _Reading:
    """What a state dict may be taken for: keys and shapes of a style, see `Fit`; `spare` may be in it or not."""

    style: str
    entries: dict[str, Entry]
    trunk: str = ""
    spare: frozenset[str] = frozenset()


def _whole(model: Network, shapes: Mapping[str, tuple[int, ...]], native: bool) -> Iterator[_Reading]:
    """The whole network, in each of its styles."""
    if native:
        yield _Reading(NATIVE, {name: Entry(name, shape) for name, shape in shapes.items()})
        return
    for name, style in type(model).KEY_STYLES.items():
        yield _Reading(name, keys.layout(shapes, style))


def _trunks(model: Network, shapes: Mapping[str, tuple[int, ...]], native: bool) -> Iterator[_Reading]:
    """The trunk alone: by the network's keys, whole and without what begins them all, and by an image classifier's."""
    for reading in _whole(model, shapes, native):
        entries = {name: entry for name, entry in reading.entries.items() if name.startswith(TRUNK)}
        yield _Reading(reading.style, entries, model.info.name)
        bare = {
            name: dataclasses.replace(entry, key=_IN_DETECTORS.sub("", entry.key)) for name, entry in entries.items()
        }
        yield _Reading(reading.style, bare, model.info.name)
    classifier = _classifier(model.trunk_of)
    for reading in _whole(classifier, shapes_of(classifier), native):
        entries = {TRUNK + name: entry for name, entry in reading.entries.items() if TRUNK + name in shapes}
        spare = {entry.key for entry in reading.entries.values()} - {entry.key for entry in entries.values()}
        yield _Reading(reading.style, entries, model.trunk_of, frozenset(spare))


@functools.cache
def _classifier(name: str) -> Network:
    return abstract({"name": name}, 1000)


def _fit(
    reading: _Reading,
    stripped: tuple[str, ...],
    arrays: Mapping[str, np.ndarray],
    model: Network,
    shapes: Mapping[str, tuple[int, ...]],
) -> Fit:
    entries = reading.entries
    wanted = {entry.key: (name, entry.shape) for name, entry in entries.items()}
    missing = [key for key in wanted if key not in arrays]
    implied = _identity(entries, shapes, model.norm_eps)
    if all(entries[name].key in missing for name in implied):
        missing = [key for key in missing if wanted[key][0] not in implied]
    else:
        implied = {}
    return Fit(
        style=reading.style,
        trunk=reading.trunk,
        stripped=stripped,
        entries=entries,
        spare=tuple(key for key in arrays if key in reading.spare),
        implied=implied,
        missing=tuple(missing),
        left_over=tuple(key for key in arrays if key not in wanted and key not in reading.spare),
        wrong=tuple(
            (name, key, tuple(arrays[key].shape), shape)
            for key, (name, shape) in wanted.items()
            if key in arrays and tuple(arrays[key].shape) != shape
        ),
        arrays=arrays,
    )


def _identity(entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]], eps: float | None) -> Params:
    """Statistics with which fixed normalisation is its scale and shift; none where it is not fixed."""
    if eps is None:
        return {}
    values = {"mean": np.float32(0), "var": np.float32(1) - np.float32(eps)}
    leaves = {name: name.rsplit("/", 1)[-1] for name in entries}
    return {name: np.full(shapes[name], values[leaf]) for name, leaf in leaves.items() if leaf in values}


def _keys_by_class(fit: Fit, model: Network) -> set[str]:
    """Keys of the file for arrays with entries by class."""
    return {fit.entries[name].key for name in model.by_class if name in fit.entries}


def _unwrapped(
    arrays: Mapping[str, np.ndarray], stripped: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, np.ndarray]]]:
    """The state dict as it is, and with one after the other of the wrappers around it taken off."""
    yield stripped, arrays
    if len(stripped) == _MOST_WRAPPERS:
        return
    for prefix in (*_WRAPPERS, _STUDENT):
        inner = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
        if inner and (len(inner) == len(arrays) or prefix == _STUDENT):
            yield from _unwrapped(inner, (*stripped, prefix))


def _message(
    source: str,
    fit: Fit,
    model: Network,
    missing: list[str],
    wrong: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]],
) -> str:
    info, rows = model.info, {name: found for name, _, found, _ in wrong}
    if not missing and not fit.left_over and {*rows} <= {*model.by_class} and {*rows} & {*model.by_class[:2]}:
        found = next(rows[name] for name in model.by_class if name in rows)
        classes = found[-1] if fit.style == NATIVE else found[0]
        of = " (the background is one)" if info.task == "detection" else ""
        advice = f". {source}#coco80 are COCO's 80 of them and the background" if classes == COCO_ROWS and of else ""
        return (
            f"{source}: its classifier has {classes} classes{of} and {info.name} is wanted with {info.num_classes}. A "
            "teacher needs weights for the classes of the data set; a network to be trained may start its classifier "
            f"anew (init.reset_head=True){advice}"
        )
    parts = []
    if missing:
        parts.append(f"missing {len(missing)} of {len(fit.entries)}: {_some(missing)}")
    if fit.left_over:
        parts.append(f"left over {len(fit.left_over)}: {_some(list(fit.left_over))}")
    if wrong:
        shapes = [f"{key} {found} instead of {wanted}" for _, key, found, wanted in wrong]
        parts.append(f"of another shape {len(wrong)}: {_some(shapes)}")
    of = f", the trunk of {fit.trunk} alone" if fit.trunk else ""
    text = f"{source}: does not fit {info.name} (read in the keys of {fit.style}{of}). {'; '.join(parts)}."
    if fit.problems < len(fit.entries) // 4:
        return f"{text} Most of it fits, so the file is of a changed {info.name} or not whole"
    near = likely(fit.arrays, like=info.name, native=fit.style == NATIVE)
    return text + (f" It looks like {near}" if near else " It fits no network of this package")


def likely(arrays: Mapping[str, np.ndarray], *, like: str, native: bool = False) -> str | None:
    """A registered network that a state dict fits in everything but, perhaps, the classifier; None if there is none.

    Args:
      arrays: By the file's keys.
      like: Name of a network: those of similar names are tried first, since each takes a moment.
      native: Whether the keys are our own names.
    """
    closeness = {name: difflib.SequenceMatcher(None, like, name).ratio() for name in registry.entries("models")}
    for name in sorted(closeness, key=closeness.get, reverse=True):
        model = abstract({"name": name}, 1000)
        fit, free = best(arrays, model, native=native, trunk=False), {*model.by_class}
        wrong = [row for row in fit.wrong if row[0] not in free and not row[0].endswith("pos_embed")]
        if not (fit.missing or fit.left_over or wrong):
            return name
    return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
