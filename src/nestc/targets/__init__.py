"""Targets: finding the installed ones through the entry-point group ``nestc.targets``, and making one from its text."""

from __future__ import annotations

import copy
import difflib
import importlib.metadata
import inspect
import itertools
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence

from nestc.errors import TargetError
from nestc.targets.api import Target

GROUP = "nestc.targets"


def entries() -> dict[str, importlib.metadata.EntryPoint]:
    """The entry points of the group ``nestc.targets`` by target name, sorted; nothing is imported."""
    found = importlib.metadata.entry_points(group=GROUP)
    return {entry.name: entry for entry in sorted(found, key=lambda entry: entry.name)}


def installed() -> dict[str, Target]:
    """Every installed target with its default options, by name; one that cannot be loaded here is left out."""
    available: dict[str, Target] = {}
    for name in entries():
        try:
            available[name] = make(name)
        except TargetError:
            continue
    return available


def make(text: str, defaults: Mapping[str, object] | None = None) -> Target:
    """Make a target of ``name`` or ``name:option=value,option2=value2``.

    A first word without ``=`` is the value of the target's first option: ``openvino:GPU`` is ``openvino:device=GPU``.
    `defaults` gives options that the text does not, to targets that have such options. Raises TargetError for an
    unknown name or option (the nearest is suggested), a value of the wrong kind, or a target that does not load.
    """
    name, _, rest = text.partition(":")
    known = entries()
    if name not in known:
        raise TargetError(
            f"unknown target {name!r}{suggestion(name, known)}; installed targets: {', '.join(known) or 'none'}"
        )
    try:
        factory = known[name].load()
    except (ImportError, AttributeError) as error:
        raise TargetError(f"target {name!r} does not load: {error}") from error
    known_options = _parameters(factory)
    given = {key: value for key, value in (defaults or {}).items() if key in known_options}
    return factory(**{**given, **_options(name, rest, known_options)})


def resolve(targets: Iterable[str | Target], defaults: Mapping[str, object] | None = None) -> tuple[Target, ...]:
    """Targets from names, texts with options, or Target objects, in the order given.

    `defaults` as for `make`. A second device of a kind is called ``vta_2`` and so on (an object is copied for that);
    TargetError if it is the very same one, or the one processor that the first also runs on.
    """
    made = [make(target, defaults) if isinstance(target, str) else target for target in targets]
    names = [target.name for target in made]
    for index, name in enumerate(names):
        before = names[:index]
        if name not in before:
            continue
        _require_another_device(made[index], [made[other] for other, used in enumerate(before) if used == name])
        taken = {target.name for target in made}
        number = next(number for number in itertools.count(2) if f"{name}_{number}" not in taken)
        made[index] = _renamed(made[index], f"{name}_{number}")
    return tuple(made)


def _require_another_device(target: Target, others: Sequence[Target]) -> None:
    """Raise TargetError if `target` is the same device as one of `others`, which have its name."""
    if any(other is target for other in others):
        raise TargetError(
            f"target {target.name!r} is given twice, as the same object; make another for a second device"
        )
    if any(target.machine.resource and other.machine.resource == target.machine.resource for other in others):
        raise TargetError(
            f"target {target.name!r} is given twice, but there is one {target.machine.resource} for both; give it once"
        )


def _renamed(target: Target, name: str) -> Target:
    """A second device of a kind under a name of its own; a copy, since the object given is somebody else's."""
    second = copy.copy(target)
    try:
        second.name = name
    except AttributeError as error:
        raise TargetError(f"target {target.name!r} is given twice, and its name cannot be set: {error}") from error
    return second


def suggestion(word: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the nearest of the known words, or an empty text."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _options(name: str, text: str, kinds: Mapping[str, type]) -> dict[str, object]:
    """Read ``option=value,...`` by the parameters of the target's constructor, whose annotations give the kinds."""
    if not text:
        return {}
    options: dict[str, object] = {}
    for index, part in enumerate(text.split(",")):
        key, equals, value = part.partition("=")
        if not equals and index == 0 and kinds and key and key not in kinds:
            key, value = next(iter(kinds)), key
        elif not equals:
            raise TargetError(f"option {part!r} of target {name!r} has no value; write {name}:{part}=VALUE")
        if key not in kinds:
            listed = ", ".join(kinds) or "it has none"
            raise TargetError(f"target {name!r} has no option {key!r}{suggestion(key, kinds)}; its options: {listed}")
        if key in options:
            raise TargetError(f"option {key!r} of target {name!r} is given twice")
        options[key] = _convert(name, key, value, kinds[key])
    return options


def _parameters(factory: typing.Any) -> dict[str, type]:
    """Kind of each constructor parameter: bool, int, float, or str where the annotation names none of them."""
    hints: Mapping[str, typing.Any] = typing.get_type_hints(factory.__init__)
    kinds: dict[str, type] = {}
    for parameter in inspect.signature(factory).parameters:
        hint = hints.get(parameter)
        choices = (hint, *typing.get_args(hint))
        kinds[parameter] = next((kind for kind in (bool, int, float) if kind in choices), str)
    return kinds


def _convert(name: str, key: str, value: str, kind: type) -> object:
    """The value of an option as its kind; TargetError if it does not read as one."""
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if value.lower() in words:
            return words[value.lower()]
        raise TargetError(f"option {key!r} of target {name!r} is true or false, not {value!r}")
    try:
        return kind(value)
    except ValueError:
        raise TargetError(f"option {key!r} of target {name!r} is a number ({kind.__name__}), not {value!r}") from None


class _CallableModule(types.ModuleType):
    """This module, callable: the public contract has ``nestc.targets()`` where Python has the package's name."""

    def __call__(self) -> dict[str, Target]:
        return installed()


sys.modules[__name__].__class__ = _CallableModule
