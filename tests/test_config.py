"""Settings: presets, overrides, refusals that name the field, and the way through JSON and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anysite import config
from anysite.config import Config, load, override_sites, parse, setting_names
from anysite.errors import ConfigError
from anysite.settings import MethodSettings


def value_of(settings: Config, name: str) -> Any:
    result: Any = settings
    for part in name.split("."):
        result = result[part] if isinstance(result, dict) else getattr(result, part)
    return result


@pytest.mark.parametrize("name", config.preset_names())
def test_every_preset_loads_and_survives_json(name: str) -> None:
    settings = load(name)
    assert settings.objectives
    assert parse(json.loads(json.dumps(settings.model_dump(mode="json")))) == settings


def test_an_empty_file_is_the_baseline(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("")
    assert load(str(tmp_path / "empty.toml")) == load("baseline") == Config()


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("seed=7", "seed", 7),
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("train.learning_rate=1", "train.learning_rate", 1.0),
        ("train.prefetch=false", "train.prefetch", False),
        ("train.schedule=polynomial", "train.schedule", "polynomial"),
        ("train.schedule='constant'", "train.schedule", "constant"),
        (" train.steps =5", "train.steps", 5),
        ("plan.dimension=2.5d", "plan.dimension", "2.5d"),
        ("plan.patch_size=[32, 48]", "plan.patch_size", (32, 48)),
        ("augment.scale=[1, 2]", "augment.scale", (1.0, 2.0)),
        ("test_domains=['a b', \"c\"]", "test_domains", ("a b", "c")),
        ("network.name=segresnet", "network.name", "segresnet"),
        ("network.width=4", "network.width", 4),
        ("objectives.supervised.weight=0.5", "objectives.supervised.weight", 0.5),
        ("objectives.other.form=a=b", "objectives.other.form", "a=b"),
        ("objectives.other={deep = {er = [1, 2]}}", "objectives.other.deep.er", [1, 2]),
    ],
)
def test_an_override_reaches_its_setting_and_no_other(override: str, name: str, value: Any) -> None:
    settings = load("baseline", [override])
    found = value_of(settings, name)
    assert found == value
    assert type(found) is type(value)
    for other in setting_names():
        if not name.startswith(other):
            assert value_of(settings, other) == value_of(Config(), other)


def test_the_last_override_counts_and_the_file_comes_first(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("seed = 3\n[train]\nsteps = 10\n[network]\nname = 'unet'\nwidth = 8\n")
    settings = load(str(tmp_path / "my.toml"), ["train.steps=20", "train.steps=30"])
    assert (settings.seed, settings.train.steps, settings.network.arguments) == (3, 30, {"width": 8})


def test_method_settings_keep_the_name_apart_from_the_arguments() -> None:
    method = MethodSettings.model_validate({"name": "unet", "width": 4, "norm": "group"})
    assert method.arguments == {"width": 4, "norm": "group"}
    method.arguments["width"] = 5  # a copy
    assert method.arguments["width"] == 4


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("train.stepz=5", "train.steps"),
        ("train.learningrate=1", "train.learning_rate"),
        ("augment.rotation=3", "augment.rotation_degrees"),
        ("trian.steps=5", "train"),
        ("steps=5", "train.steps"),
        ("predict.flip=true", "predict.flips"),
    ],
)
def test_an_unknown_setting_suggests_the_right_one(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown setting.*Did you mean '{right}'") as caught:
        load("baseline", [wrong])
    assert caught.value.where in wrong


def test_a_setting_like_no_other_points_to_the_list() -> None:
    with pytest.raises(ConfigError, match=r"^qqqq: unknown setting. See docs/settings.md"):
        load("baseline", ["qqqq=1"])


@pytest.mark.parametrize(
    ("override", "place", "expected"),
    [
        ("seed=abc", "seed", "valid integer"),
        ("seed=-1", "seed", "greater than or equal to 0"),
        ("member=-1", "member", "greater than or equal to 0"),
        ("train.steps=0", "train.steps", "greater than 0"),
        ("train.steps=1.5", "train.steps", "integer"),
        ("train.steps=", "train.steps", "integer"),
        ("train.learning_rate=inf", "train.learning_rate", "finite"),
        ("train.learning_rate=nan", "train.learning_rate", "finite|greater"),
        ("train.foreground_fraction=1.01", "train.foreground_fraction", "less than or equal to 1"),
        ("train.validation_fraction=1", "train.validation_fraction", "less than 1"),
        ("train.schedule=linear", "train.schedule", "'cosine'"),
        ("plan.spacing=[1, -1]", "plan.spacing", "positive numbers"),
        ("plan.patch_size=[0, 32]", "plan.patch_size", "positive numbers"),
        ("plan.patch_size=[]", "plan.patch_size", "positive numbers"),
        ("plan.spacing=[1, 'a']", "plan.spacing.1", "number"),
        ("augment.scale=[1.4, 0.7]", "augment.scale", "smaller one first"),
        ("augment.scale=[0, 0.7]", "augment.scale", "two positive numbers"),
        ("augment.noise_sigma=[-1, 0.7]", "augment.noise_sigma", "from 0"),
        ("augment.flip_axes=[0, 0]", "augment.flip_axes", "at most once"),
        ("augment.flip_axes=[-1]", "augment.flip_axes", "from 0"),
        ("augment.gamma_exponent=[1, inf]", "augment.gamma_exponent.1", "finite"),
        ("test_domains=west", "test_domains", "tuple"),
        ("network=unet", "network", "MethodSettings".lower()),
        ("network={width = 4}", "network.name", "required"),
        ("objectives={}", "objectives", "at least 1"),
        ("objectives.supervised=1", "objectives.supervised", "dictionary"),
    ],
)
def test_a_wrong_value_names_the_field_and_the_expectation(override: str, place: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        load("baseline", [override])
    assert caught.value.where == place
    assert "\n" not in str(caught.value)


def test_overrides_and_files_that_cannot_be_read(tmp_path: Path) -> None:
    for override in ("train.steps", "=5", " =5"):
        with pytest.raises(ConfigError, match="such as train.steps=500"):
            load("baseline", [override])
    with pytest.raises(ConfigError, match="not a group"):
        load("baseline", ["seed=1", "seed.more=2"])
    with pytest.raises(ConfigError, match="unknown preset 'strong'.*baseline"):
        load("strong")
    with pytest.raises(ConfigError, match="no such file"):
        load(str(tmp_path / "none.toml"))
    for content in (b"seed = ", b"seed = '\xff'"):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(ConfigError, match="not readable as TOML"):
            load(str(tmp_path / "bad.toml"))


def test_settings_cannot_be_changed_afterwards() -> None:
    settings = load()
    with pytest.raises(ValueError, match="frozen"):
        settings.train.steps = 3


@given(
    steps=st.integers(1, 10**6),
    rate=st.floats(1e-8, 1e3),
    domains=st.lists(st.text(max_size=8), max_size=3),
    patch=st.none() | st.lists(st.integers(1, 512), min_size=2, max_size=3),
    scale=st.tuples(st.floats(0.1, 1), st.floats(1, 3)),
    extras=st.dictionaries(st.sampled_from(["width", "norm", "depth"]), st.integers() | st.text(max_size=4)),
    weight=st.floats(allow_nan=False, allow_infinity=False),
)
def test_dumping_and_parsing_gives_the_same_settings(
    steps: int, rate: float, domains: list[str], patch: Any, scale: Any, extras: dict[str, Any], weight: float
) -> None:
    settings = parse(
        {
            "test_domains": domains,
            "network": {"name": "unet", **extras},
            "objectives": {"supervised": {"weight": weight}},
            "plan": {"patch_size": patch},
            "augment": {"scale": scale},
            "train": {"steps": steps, "learning_rate": rate},
        }
    )
    back = parse(json.loads(json.dumps(settings.model_dump(mode="json"), allow_nan=False)))
    assert back == settings
    assert (back.test_domains, back.network.arguments) == (tuple(domains), extras)


def test_every_leaf_of_a_dump_has_a_name() -> None:
    def leaves(content: dict[str, Any], prefix: str = "") -> list[str]:
        names = []
        for key, value in content.items():
            inner = isinstance(value, dict) and key not in ("objectives", "detectors", "settings")
            names += leaves(value, f"{prefix}{key}.") if inner else [prefix + key]
        return names

    assert sorted(setting_names()) == sorted(leaves(Config().model_dump()))
    assert len(set(setting_names())) == len(setting_names())


def test_sites_of_any_name_can_be_left_out() -> None:
    names = ('St. "Anna"', "back\\slash", "Zürich, 3T", "a+b")
    assert load("baseline", [override_sites(names)]).test_domains == names


def test_a_quoted_part_of_a_name_may_hold_dots() -> None:
    config = load("baseline", ['objectives."my_pkg.net:My".weight=0.5', "train.steps = 7"])
    assert config.objectives["my_pkg.net:My"] == {"weight": 0.5}
    assert config.train.steps == 7
    with pytest.raises(ConfigError, match=r"the name 'train steps'.*in quotes"):
        load("baseline", ["train steps=7"])
