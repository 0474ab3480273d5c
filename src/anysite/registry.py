"""Every method by name: one line each, imported only when used."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from anysite.errors import ConfigError

NETWORKS = {
    "unet": "anysite.networks.unet:UNet",
    "ram_dsir_unet": "anysite.networks.ram_dsir_unet:RamDsirUNet",
    "dynunet": "anysite.networks.dynunet:DynUNet",
    "segresnet": "anysite.networks.segresnet:SegResNet",
    "mednext": "anysite.networks.mednext:MedNeXt",
    "unetr": "anysite.networks.unetr:UNETR",
    "swin_unetr": "anysite.networks.swin_unetr:SwinUNETR",
}

OBJECTIVES = {
    "supervised": "anysite.objectives.supervised:Supervised",
    "ram_dsir": "anysite.objectives.ram_dsir:RamDsir",
    "medcontext": "anysite.objectives.medcontext:MedContext",
    "auxiliary_reconstruction": "anysite.objectives.auxiliary_reconstruction:AuxiliaryReconstruction",
    "tile_autoencoder": "anysite.objectives.tile_autoencoder:TileAutoencoder",
    "masked_autoencoder": "anysite.objectives.masked_autoencoder:MaskedAutoencoder",
    "reflection": "anysite.objectives.reflection:Reflection",
}

ADAPTERS = {
    "refseg": "anysite.adapters.refseg:RefSeg",
    "tent": "anysite.adapters.tent:Tent",
    "reliable_entropy": "anysite.adapters.reliable_entropy:ReliableEntropy",
    "denoising_prior": "anysite.adapters.denoising_prior:DenoisingPrior",
    "fourier_prompt": "anysite.adapters.fourier_prompt:FourierPrompt",
    "intensity_views": "anysite.adapters.intensity_views:IntensityViews",
    "standard_views": "anysite.adapters.standard_views:StandardViews",
    "batch_statistics": "anysite.adapters.batch_statistics:BatchStatistics",
}

AUTO_ADAPTER = "standard_views"  # on corrupted source images it harmed far fewer masks than refseg

DETECTORS = {
    "spectral": "anysite.detectors.spectral:Spectral",
    "histogram": "anysite.detectors.histogram:Histogram",
    "power_spectrum": "anysite.detectors.power_spectrum:PowerSpectrum",
    "shading": "anysite.detectors.shading:Shading",
    "mahalanobis": "anysite.detectors.mahalanobis:Mahalanobis",
    "nearest": "anysite.detectors.nearest:Nearest",
    "entropy": "anysite.detectors.entropy:Entropy",
    "shape": "anysite.detectors.shape:Shape",
    "soft_dice": "anysite.detectors.soft_dice:SoftDice",
    "pairwise_dice": "anysite.detectors.pairwise_dice:PairwiseDice",
}

TABLES = {"network": NETWORKS, "objective": OBJECTIVES, "detector": DETECTORS, "adapter": ADAPTERS}

_plugins: set[str] = set()


@dataclass(frozen=True)
class Method:
    """What is known of a registered method without importing it."""

    kind: str
    name: str
    headline: str
    settings: dict[str, str]


def trust(target: str) -> None:
    """Allow the out-of-tree class `module:Class` to be named in configurations of this process.

    A run folder may name any class; only those the user has trusted are ever imported.
    """
    if target.count(":") != 1:
        raise ConfigError(f"plug-in {target!r}", expected="module:Class")
    _plugins.add(target)


def list_trusted() -> tuple[str, ...]:
    """Return the out-of-tree classes that this process may import, for another process to trust."""
    return tuple(sorted(_plugins))


def find(kind: str, name: str) -> type:
    """Import and return the class registered as `name`, or the trusted plug-in `module:Class`.

    Raises:
        ConfigError: an unknown name, or a plug-in that the user has not trusted or that does not import.
    """
    table = TABLES[kind]
    if name not in table and name not in _plugins:
        if ":" in name:
            raise ConfigError(
                f"{kind} {name!r} lies outside anysite", fix=f"pass --plugin {name} if you trust its code"
            )
        raise ConfigError(f"unknown {kind} {name!r}", expected=_suggest(name, table))
    module, _, attribute = table.get(name, name).partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{kind} {name!r} cannot be imported ({error})") from error


def build(kind: str, name: str, /, *arguments: Any, **settings: Any) -> Any:
    """Construct the method `name`; `settings` are the keyword arguments of its constructor.

    Raises:
        ConfigError: an unknown name or setting.
    """
    method = find(kind, name)
    known = [
        p.name
        for p in inspect.signature(method).parameters.values()
        if p.default is not inspect.Parameter.empty
    ]
    for setting in settings:
        if setting not in known:
            raise ConfigError(
                f"{kind} {name!r} has no setting {setting!r}",
                expected=_suggest(setting, dict.fromkeys(known)),
            )
    try:
        hints = get_type_hints(method.__init__)
    except NameError:  # imported for type checking alone, by a class outside anysite
        hints = {}
    for setting, value in settings.items():
        if setting not in hints:
            continue
        try:
            settings[setting] = TypeAdapter(hints[setting]).validate_python(value)
        except ValidationError as error:
            raise ConfigError(
                f"{value!r}",
                where=f"{kind} {name!r}, setting {setting!r}",
                expected=error.errors()[0]["msg"].lower(),
            ) from None
    return method(*arguments, **settings)


def describe(kind: str, name: str) -> Method:
    """Read a method's first line and settings from its source, without importing it."""
    module, _, class_name = TABLES[kind][name].partition(":")
    # find_spec would import the parent packages; the source lies beside this file.
    source = (
        Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text(encoding="utf-8")
    )
    tree = ast.parse(source)
    headline = (ast.get_docstring(tree) or "").splitlines()[0]
    settings: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for function in node.body:
                if isinstance(function, ast.FunctionDef) and function.name == "__init__":
                    settings = _keyword_defaults(function.args)
    return Method(kind, name, headline, settings)


def _keyword_defaults(arguments: ast.arguments) -> dict[str, str]:
    pairs = list(zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
    return {argument.arg: ast.unparse(default) for argument, default in pairs if default is not None}


def _suggest(name: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    listing = f"one of {', '.join(known)}" if known else "no settings at all"
    return f"{listing} (did you mean {close[0]!r}?)" if close else listing
