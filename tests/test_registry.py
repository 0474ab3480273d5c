"""Methods by name: headlines, settings, suggestions, and plug-ins that must be trusted first."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from anysite import registry
from anysite.adapters import Adapter
from anysite.config import load
from anysite.detectors import Detector
from anysite.errors import ConfigError
from anysite.learner import build_network
from anysite.networks import Network
from anysite.normalisation import Normalisation
from anysite.objectives import Objective
from anysite.plan import Plan

REGISTERED = [(kind, name) for kind, table in registry.TABLES.items() for name in table]
BASES = {"network": Network, "objective": Objective, "detector": Detector, "adapter": Adapter}
PLUGIN = "site_plugin:Plain"
PLUGIN_SOURCE = """
from anysite.networks.unet import UNet

class Plain(UNet):
    def __init__(self, channels, classes, patch_size, *, width: int = 4) -> None:
        super().__init__(channels, classes, patch_size, width=width, depth=2)
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "site_plugin.py").write_text(PLUGIN_SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_plugins", set())
    yield PLUGIN
    sys.modules.pop("site_plugin", None)


def keyword_settings(method: type) -> dict[str, object]:
    return {
        p.name: p.default
        for p in inspect.signature(method).parameters.values()
        if p.default is not inspect.Parameter.empty
    }


@pytest.mark.parametrize(("kind", "name"), REGISTERED)
def test_every_method_imports_and_keeps_its_base(kind: str, name: str) -> None:
    method = registry.find(kind, name)
    assert issubclass(method, BASES[kind])
    assert method.__module__ == registry.TABLES[kind][name].partition(":")[0]


@pytest.mark.parametrize(("kind", "name"), REGISTERED)
def test_describe_reads_what_the_class_itself_says(kind: str, name: str) -> None:
    told = registry.describe(kind, name)
    expected = keyword_settings(registry.find(kind, name))
    assert {key: ast.literal_eval(text) for key, text in told.settings.items()} == expected
    assert (told.kind, told.name) == (kind, name)


@pytest.mark.parametrize(("kind", "name"), REGISTERED)
def test_line_one_names_the_source(kind: str, name: str) -> None:
    """Name, authors, year and link, so that `anysite methods` cites every method."""
    module = importlib.import_module(registry.TABLES[kind][name].partition(":")[0])
    line = (inspect.getdoc(module) or "").splitlines()[0]
    assert registry.describe(kind, name).headline == line
    assert re.fullmatch(r"[A-Z][^:]+: .*[A-Z]\w+.*, (19|20)\d\d, https://\S+[.;]?.*", line), line


@pytest.mark.parametrize(
    ("kind", "wrong", "right"),
    [
        ("network", "unnet", "unet"),
        ("network", "swin-unetr", "swin_unetr"),
        ("objective", "supervized", "supervised"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(kind: str, wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown {kind} '{wrong}'.*did you mean '{right}'"):
        registry.find(kind, wrong)
    with pytest.raises(ConfigError, match=rf"expected one of {', '.join(registry.TABLES[kind])}\.$"):
        registry.find(kind, "qqqq")


def test_an_unknown_setting_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'unet' has no setting 'widht'.*did you mean 'width'"):
        registry.build("network", "unet", 1, 2, (32, 32), widht=4)
    with pytest.raises(ConfigError, match=r"'supervised' has no setting 'wieght'.*did you mean 'weight'"):
        registry.build("objective", "supervised", wieght=4)


@pytest.mark.parametrize("setting", ["kind", "name", "channels", "self"])
def test_names_of_other_parameters_are_no_settings(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"has no setting '{setting}'"):
        registry.build("network", "unet", 1, 2, (32, 32), **{setting: 3})


def test_settings_reach_the_constructor() -> None:
    network = registry.build("network", "unet", 1, 2, (32, 32), width=6, depth=2)
    assert network.widths == (6, 12)
    assert registry.build("objective", "supervised", weight=0.25).weight == 0.25


def test_a_plugin_is_refused_until_trusted(plugin: str) -> None:
    with pytest.raises(ConfigError, match=f"lies outside anysite.*--plugin {plugin}"):
        registry.find("network", plugin)
    assert "site_plugin" not in sys.modules  # refused before any of its code ran
    registry.trust(plugin)
    assert registry.find("network", plugin).__name__ == "Plain"
    with pytest.raises(ConfigError, match="lies outside"):
        registry.find("network", "site_plugin:Other")
    with pytest.raises(ConfigError, match="lies outside"):
        registry.find("network", "os:system")


def test_a_trusted_plugin_is_built_from_a_configuration(plugin: str) -> None:
    registry.trust(plugin)
    plan = Plan(
        dimension=2,
        image_dimension=2,
        spacing=(1, 1),
        unit="px",
        channels=1,
        normalisation=(Normalisation(),),
        patch_size=(16, 16),
        classes=("background", "organ"),
        label_values=(0, 1),
    )
    network = build_network(load("baseline", [f"network.name={plugin}", "network.width=5"]), plan)
    assert network.widths == (5, 10)
    with pytest.raises(ConfigError, match=r"has no setting 'depth'; expected one of width"):
        build_network(load("baseline", [f"network.name={plugin}", "network.depth=5"]), plan)


@pytest.mark.parametrize("target", ["site_plugin", "a:b:c", ""])
def test_only_a_module_and_class_can_be_trusted(target: str) -> None:
    with pytest.raises(ConfigError, match="expected module:Class"):
        registry.trust(target)


@pytest.mark.parametrize("target", ["no_such_module:Class", "site_plugin:NoSuchClass"])
def test_a_plugin_that_does_not_import_says_why(plugin: str, target: str) -> None:
    registry.trust(target)
    with pytest.raises(ConfigError, match=r"cannot be imported \(.*(no_such_module|NoSuchClass)"):
        registry.find("network", target)


def test_a_plugin_may_leave_its_settings_without_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        "from __future__ import annotations\n\n\n"
        "class Untyped:\n    def __init__(self, *, strength=1):\n        self.strength = strength\n\n\n"
        "class Hidden:\n    def __init__(self, *, strength: Unknown = 1):\n        self.strength = strength\n"
    )
    (tmp_path / "untyped_plugin.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_plugins", set())
    for name in ("untyped_plugin:Untyped", "untyped_plugin:Hidden"):
        registry.trust(name)
        assert registry.build("objective", name, strength=3).strength == 3
        assert registry.build("objective", name).strength == 1
    sys.modules.pop("untyped_plugin", None)


def test_the_types_of_settings_are_checked() -> None:
    network = registry.build("network", "unet", 1, 2, (32, 32), residual="false", width=4)
    plain = registry.build("network", "unet", 1, 2, (32, 32), residual=False, width=4)
    assert network.state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(ConfigError, match="network 'unet', setting 'width': 'wide'; expected .*integer"):
        registry.build("network", "unet", 1, 2, (32, 32), width="wide")
    with pytest.raises(ConfigError, match="objective 'supervised', setting 'weight'"):
        registry.build("objective", "supervised", weight="abc")
