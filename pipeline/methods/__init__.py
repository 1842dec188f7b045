"""The methods against forgetting, by the names that recipes use. An empty `method:` is sequential tuning."""

import difflib
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mcit.data_prep.errors import InputError

from .asd import Asd
from .base import Method, StepView
from .dare import Dare
from .der import Der
from .ewc import Ewc
from .fpf import Fpf
from .freeze import Freeze
from .gere import Gere
from .hft import Hft
from .ilora import ILora
from .interference import Interference
from .interpolate import Interpolate
from .l2 import L2
from .l2p import L2P
from .lwf import Lwf
from .magmax import MagMax
from .mas import Mas
from .maxmerge import MaxMerge
from .moelora import MoELora
from .moextend import MoExtend
from .olora import OLora
from .osf import Osf
from .refresh import Refresh
from .reglora import RegLora
from .replay import ExperienceReplay
from .ties import Ties

if TYPE_CHECKING:
    from ..recipe.schema import TrainConfig

__all__ = ["EXPANSIONS", "METHODS", "Method", "StepView", "build_methods", "expand", "get_method"]

METHODS: dict[str, type[Method]] = {
    "asd": Asd,
    "dare": Dare,
    "der": Der,
    "ewc": Ewc,
    "fpf": Fpf,
    "freeze": Freeze,
    "gere": Gere,
    "hft": Hft,
    "ilora": ILora,
    "interference": Interference,
    "interpolate": Interpolate,
    "l2": L2,
    "l2p": L2P,
    "lwf": Lwf,
    "magmax": MagMax,
    "mas": Mas,
    "maxmerge": MaxMerge,
    "moelora": MoELora,
    "moextend": MoExtend,
    "olora": OLora,
    "osf": Osf,
    "refresh": Refresh,
    "reglora": RegLora,
    "replay": ExperienceReplay,
    "ties": Ties,
}

# Names that stand for several methods with the settings of one paper.
EXPANSIONS: dict[str, dict[str, dict[str, Any]]] = {
    "derpp": {"der": {"label_weight": 0.5}},  # beta: DER++ (one of the paper's values)
    "sefe": {
        "asd": {"fraction": 0.2, "converter": "rules"},  # 20 %: SEFE (page); it converts by LLM, rules are ours
        "reglora": {"key_fraction": 0.02, "weight": 2500},  # SEFE (code)
    },
}


def get_method(name: str) -> type[Method]:
    """The class of a method, by its name or as `module:Class`. Raises `InputError`."""
    if name in METHODS:
        return METHODS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        known = sorted([*METHODS, *EXPANSIONS])
        close = difflib.get_close_matches(name, known, n=1)
        remedy = f"Did you mean `{close[0]}`?" if close else f"Known: {', '.join(known)}, or module:Class"
        raise InputError("no such method", where="recipe", field=f"method.{name}", remedy=remedy)
    try:
        method = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # of whatever stands in a module of the user's
        reason = f"cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
        raise InputError(reason, where="recipe", field=f"method.{name}") from None
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise InputError("is not a subclass of mcit.pipeline.methods.Method", where="recipe", field=f"method.{name}")
    return method


def expand(section: Mapping[str, Mapping[str, Any] | None]) -> dict[str, dict[str, Any]]:
    """A recipe's `method:` with `sefe` and the like replaced by their parts and every default filled in.

    Below an expansion, settings are given by part (`sefe: {reglora: {weight: 100}}`); a part that the recipe also names
    itself takes those settings on top. Expanding twice changes nothing. Raises `InputError`.
    """
    parts: dict[str, dict[str, Any]] = {}
    for name, settings in section.items():
        if name not in EXPANSIONS:
            continue
        for part, own in (settings or {}).items():
            remedy = f"It takes {', '.join(EXPANSIONS[name])}, each with its own settings"
            if part not in EXPANSIONS[name]:
                raise InputError(f"has no part `{part}`", where="recipe", field=f"method.{name}", remedy=remedy)
            if not isinstance(own, Mapping | None):
                raise InputError("is no settings", where="recipe", field=f"method.{name}.{part}", remedy=remedy)
        for part, defaults in EXPANSIONS[name].items():
            parts.setdefault(part, {}).update(defaults | ((settings or {}).get(part) or {}))
    for name, settings in section.items():
        if name not in EXPANSIONS:
            parts.setdefault(name, {}).update(settings or {})
    return {name: _validate(name, settings).model_dump() for name, settings in parts.items()}


def build_methods(section: Mapping[str, Mapping[str, Any] | None], train: "TrainConfig") -> list[Method]:
    """The methods of a stage, checked against its lineage and paradigm and against each other. Raises `InputError`."""
    methods = [get_method(name)(_validate(name, settings)) for name, settings in expand(section).items()]
    for method in methods:
        _require(method, "lineage", train.lineage, method.lineages)
        for phase in train.phases:
            _require(method, "paradigm", phase, method.paradigms)
        if train.packing and not method.packs:
            problem = f"{method.name} looks at each sample's row as a whole"
            raise InputError(problem, where="recipe", field="train.packing", remedy="Leave it out")
        if method.carries and {train.modules.projector, train.modules.vision} != {"frozen"}:
            problem = f"{method.name} trains nothing but its own weights"
            raise InputError(problem, where="recipe", field="train.modules", remedy="Leave projector and vision frozen")
        for other in methods:
            if other is not method and (reason := _conflict(method, other)) is not None:
                problem = f"does not work together with {other.name}{reason}"
                raise InputError(problem, where="recipe", field=f"method.{method.name}")
    return methods


def _conflict(method: Method, other: Method) -> str | None:
    """Why two methods exclude each other: words to go on with, or None if they do not."""
    if other.name in method.conflicts:
        return ""
    if method.needs_lora and other.carries:
        return ": it acts on LoRA, and there is none"
    if method.carries and other.carries:
        return ": each has the policy in weights of its own"
    if all(type(one).served is not Method.served for one in (method, other)):
        return ": each has something else evaluated"
    return None


def _validate(name: str, settings: Mapping[str, Any]) -> Any:
    method = get_method(name)
    try:
        return method.Config.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(["method", name, *map(str, first["loc"])])
        known = ", ".join(method.Config.model_fields)
        remedy = f"Known keys: {known}" if first["type"] == "extra_forbidden" else ""
        raise InputError(first["msg"], where="recipe", field=place, remedy=remedy) from None


def _require(method: Method, what: str, value: str, allowed: Any) -> None:
    if value not in allowed:
        raise InputError(
            f"works with {what} {' or '.join(allowed)}, not {value}",
            where="recipe",
            field=f"method.{method.name}",
            remedy=f"Change train.{what} or drop the method",
        )
