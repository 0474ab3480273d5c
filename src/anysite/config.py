"""Settings: TOML presets, files and `--set a.b=value`, checked before anything runs."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from anysite import registry
from anysite.errors import ConfigError
from anysite.settings import (
    AugmentSettings,
    CalibrationSettings,
    JudgeSettings,
    MethodSettings,
    PlanSettings,
    PostprocessingSettings,
    PredictSettings,
    PretrainSettings,
    Settings,
    TrainSettings,
)

MEMBER_STRIDE = 1_000_003  # between the seeds of an ensemble's networks, so that none is another run's


class Config(Settings):
    """All settings of a run; every field has a default, so an empty file is a valid configuration."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    member: int = Field(
        default=0,
        ge=0,
        description="which network of an ensemble: of one seed all learn from the same cases, each in its own order "
        "and from its own random weights",
    )
    test_domains: tuple[str, ...] = Field(default=(), description="sites kept out of training altogether")
    network: MethodSettings = MethodSettings(name="unet")
    objectives: dict[str, dict[str, Any]] = Field(
        default_factory=lambda: {"supervised": {}}, min_length=1, description="objective name to its settings"
    )
    pretrained: str | None = Field(
        default=None, description="run folder, of a pretraining or a training, whose weights to start from"
    )
    pretrain: PretrainSettings = PretrainSettings()
    plan: PlanSettings = PlanSettings()
    augment: AugmentSettings = AugmentSettings()
    train: TrainSettings = TrainSettings()
    predict: PredictSettings = PredictSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    postprocessing: PostprocessingSettings = PostprocessingSettings()
    judge: JudgeSettings = JudgeSettings()

    @property
    def training_seed(self) -> int:
        """What weights and batches are drawn by; the split is drawn by `seed` alone."""
        return self.seed + MEMBER_STRIDE * self.member


def override_sites(domains: Sequence[str]) -> str:
    """Return the override that leaves sites out, whatever characters their names hold."""
    return f"test_domains={json.dumps(list(domains), ensure_ascii=False)}"


def choose_adapter(settings: PredictSettings, name: str) -> PredictSettings:
    """Return settings with an adapter by name; with ":always" behind it, for every image, alone and without checks."""
    method = name.removesuffix(":always")
    known, _, how = method.partition(":")
    if how and known in registry.ADAPTERS:  # a name with a colon is otherwise that of a class outside anysite
        raise ConfigError(f"{name!r}", where="adapt", expected=f"{known} or {known}:always")
    changes: dict[str, Any] = {"method": method}
    former, chosen = (registry.AUTO_ADAPTER if m == "auto" else m for m in (settings.adapt.method, method))
    if former not in ("none", chosen):
        changes["settings"] = {}  # they are of another adapter
    if method != name:
        changes |= {"only_shifted": False, "guard": False, "first_share": 0.0}
    return settings.model_copy(update={"adapt": settings.adapt.model_copy(update=changes)})


def preset_names() -> list[str]:
    """Return the names of the presets that come with the package."""
    return sorted(
        p.name.removesuffix(".toml")
        for p in resources.files("anysite.presets").iterdir()
        if p.name.endswith(".toml")
    )


def load(preset: str = "robust", overrides: Sequence[str] = ()) -> Config:
    """Build the configuration from a preset name or TOML file and `a.b=value` overrides.

    Raises:
        ConfigError: an unknown preset, setting or value, with the nearest known name.
    """
    content = _read_preset(preset)
    for override in overrides:
        _apply(content, override)
    return parse(content)


def parse(content: dict[str, Any]) -> Config:
    """Check a nested dictionary of settings.

    Raises:
        ConfigError: naming the first wrong setting.
    """
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = [*setting_names(), *Config.model_fields]
            close = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else "see docs/settings.md for every setting"
            raise ConfigError("unknown setting", where=path, fix=hint) from None
        message = f"{first['input']!r}"
        raise ConfigError(message, where=path, expected=first["msg"].lower()) from None


def differing_settings(asked: Config, kept: Config) -> list[str]:
    """Return "name=value" of every setting of `asked` that `kept` does not share, and "no name" of those it lacks."""
    former = _flatten(kept.model_dump(mode="json"))
    settings = _flatten(asked.model_dump(mode="json"))
    absent = object()
    changed = [f"{name}={value}" for name, value in settings.items() if former.get(name, absent) != value]
    return changed + [f"no {name}" for name in former if name not in settings]


def setting_names(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Return the dotted name of every setting."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            names += setting_names(annotation, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _read_preset(preset: str) -> dict[str, Any]:
    if preset.endswith(".toml"):
        path = Path(preset)
        if not path.is_file():
            raise ConfigError("no such file", where=path)
        content = path.read_bytes()
    elif preset in preset_names():
        content = resources.files("anysite.presets").joinpath(f"{preset}.toml").read_bytes()
    else:
        raise ConfigError(
            f"unknown preset {preset!r}", expected=f"one of {', '.join(preset_names())}, or a .toml file"
        )
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"not readable as TOML ({error})", where=preset) from None


def _apply(content: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name.strip():
        raise ConfigError(f"--set {override}", expected="name=value, such as train.steps=500")
    text = {"True": "true", "False": "false"}.get(text.strip(), text)  # Python's spelling is a likely slip
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string, so that quotes are not needed on the command line
    *groups, last = _split_name(name)
    for group in groups:
        content = content.setdefault(group, {})
        if not isinstance(content, dict):
            raise ConfigError("a setting inside something that is not a group", where=name)
    content[last] = value


def _split_name(name: str) -> list[str]:
    """Return the parts of a dotted name, of which a quoted one may hold dots itself, as in TOML."""
    try:
        inner: Any = tomllib.loads(f"{name} = 0")
    except tomllib.TOMLDecodeError:
        raise ConfigError(
            f"the name {name.strip()!r}", expected='parts joined by dots, unusual ones in quotes: a."b.c:D".e'
        ) from None
    parts: list[str] = []
    while isinstance(inner, dict):
        ((part, inner),) = inner.items()
        parts.append(part)
    return parts


def _flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        inner = isinstance(value, dict) and value  # an empty group is a choice too, such as of an objective
        flat |= _flatten(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat
