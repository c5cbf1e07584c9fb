"""Registries: names from here and from installed packages, looked up once, imported late."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

from goldenlayers import registry
from goldenlayers.errors import UserError
from goldenlayers.registry import Registry

GROUP = "goldenlayers.test-things"


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[int]:
    """A registry, and two installed packages: one brings a thing, the other cannot be imported."""
    for package, text in (("things_good", "ONE = 1"), ("things_bad", "import nowhere_to_be_found")):
        (tmp_path / f"{package}.py").write_text(text, "utf-8")
        about = tmp_path / f"{package}-1.0.dist-info"
        about.mkdir()
        about.joinpath("METADATA").write_text(f"Name: {package}\nVersion: 1.0\n", "utf-8")
        about.joinpath("entry_points.txt").write_text(
            f"[{GROUP}]\n{package.removeprefix('things_')} = {package}:ONE\n", "utf-8"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    for package in ("things_good", "things_bad"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    return Registry("thing", GROUP, [("own", 0)])


def test_installed_names_are_there_and_imported_when_they_are_asked_for(outside: Registry[int]):
    assert list(outside) == ["own", "bad", "good"] or list(outside) == ["own", "good", "bad"]
    assert len(outside) == 3 and "good" in outside and "bad" in outside
    assert outside.known() == (0,)
    assert "things_good" not in sys.modules
    assert outside["good"] == 1 and "things_good" in sys.modules
    assert outside.known() == (0, 1)


def test_a_package_that_cannot_be_imported_is_one_message_and_hides_no_other(
    outside: Registry[int],
):
    with pytest.warns(RuntimeWarning, match="the thing 'bad' of the package 'things_bad'") as said:
        assert outside.values() == (0, 1)
    assert len(said) == 1 and "Mend or remove the package things_bad" in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert outside.values() == (0, 1)  # said once
    with pytest.raises(UserError, match=r"cannot be imported: ModuleNotFoundError: .*nowhere"):
        outside["bad"]


def test_installed_packages_are_looked_up_once(
    outside: Registry[int], monkeypatch: pytest.MonkeyPatch
):
    calls: list[str] = []
    real = registry.entry_points

    def counted(*, group: str):
        calls.append(group)
        return real(group=group)

    monkeypatch.setattr(registry, "entry_points", counted)
    assert "nothing" not in outside and "good" in outside and len(list(outside)) == 3
    assert calls == [GROUP]
    outside.refresh()
    assert "good" in outside and calls == [GROUP, GROUP]


def test_names_are_taken_once_and_unknown_ones_have_near_matches(outside: Registry[int]):
    for taken in ("own", "good"):
        with pytest.raises(UserError, match=f"there is thing '{taken}' already"):
            outside.register(taken, 5)
    assert outside.register("good", 5, replace=True) == 5 and outside["good"] == 5
    outside.unregister("good")
    outside.unregister("good")
    assert outside["good"] == 1
    with pytest.raises(UserError, match=r"unknown thing 'oen'.*Did you mean 'own'"):
        outside["oen"]
