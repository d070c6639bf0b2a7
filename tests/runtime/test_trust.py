"""What other users can change, on the way to a file and in it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bitlinear.runtime import trust
from bitlinear.runtime.trust import (
    is_own_folder,
    leads_through_foreign_link,
    why_replaceable,
    why_unsafe,
)
from tests.runtime.test_pinned import NOBODY, as_root, root

__all__ = ["root"]  # a fixture


@pytest.mark.parametrize(
    ("owner", "mode", "expected"),
    [
        (None, 0o700, False),
        (None, 0o755, False),
        (None, 0o775, True),
        (None, 0o702, True),
        (None, 0o1777, False),  # as /tmp
        (None, 0o1770, False),
        (None, 0o2775, True),
        pytest.param(NOBODY, 0o700, True, marks=as_root),
        pytest.param(NOBODY, 0o1777, True, marks=as_root),  # its owner can rename every entry
    ],
)
@pytest.mark.parametrize("below", ["cache", "one/cache"])
def test_who_can_rename_a_parent_can_replace_what_is_below(
    root: Path, owner: int | None, mode: int, expected: bool, below: str
) -> None:
    parent = root / "parent"
    (parent / below).mkdir(parents=True)
    if owner is not None:
        os.chown(parent, owner, owner)
    parent.chmod(mode)
    assert (str(parent) in why_replaceable(parent / below)) == expected
    assert (str(parent) in why_replaceable(parent, entries=True)) == expected
    assert bool(why_replaceable(parent)) == (owner is not None)


def link_of_others(root: Path) -> Path:
    """A link in a sticky directory, as another user leaves it in /tmp."""
    (root / "target" / "cache").mkdir(parents=True)
    (root / "link").symlink_to(root / "target")
    os.lchown(root / "link", NOBODY, NOBODY)
    return root / "link" / "cache"


def end_of_others(root: Path) -> Path:
    """A link in a sticky directory, to which an own link leads; it may turn into a directory."""
    (root / "target").mkdir()
    (root / "theirs").symlink_to("target")
    os.lchown(root / "theirs", NOBODY, NOBODY)
    (root / "link").symlink_to("theirs")
    return root / "link"


def link_through_others(root: Path) -> Path:
    """An own link, which leads through a directory of another user."""
    (root / "theirs" / "below" / "cache").mkdir(parents=True)
    os.chown(root / "theirs", NOBODY, NOBODY)
    (root / "link").symlink_to("theirs/below")
    return root / "link" / "cache"


def parent_of_others(root: Path) -> Path:
    """``..`` leaves a directory of another user, in which it could be a link's."""
    (root / "theirs" / "below").mkdir(parents=True)
    (root / "theirs" / "cache").mkdir()
    os.chown(root / "theirs", NOBODY, NOBODY)
    return root / "theirs" / "below" / ".." / "cache"


@as_root
@pytest.mark.parametrize(
    "make", [link_of_others, end_of_others, link_through_others, parent_of_others]
)
def test_links_on_the_way_are_judged(root: Path, make: Callable[[Path], Path]) -> None:
    path = make(root)
    assert f"belongs to user {NOBODY}" in why_replaceable(path)
    assert leads_through_foreign_link(path) == (make in (link_of_others, end_of_others))


def test_root_of_a_user_namespace_may_be_unmapped(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in rootless containers: the owner of / and /tmp is shown as nobody."""
    (root / "cache").mkdir()
    monkeypatch.setattr(trust, "_ROOT", -1)
    monkeypatch.setattr(os, "geteuid", lambda: -2)
    assert "belongs to user 0" in why_replaceable(root / "cache")
    monkeypatch.setattr(trust, "_unmapped_owner", lambda: (0,))
    assert why_replaceable(root / "cache") == ""
    assert "belongs to user 0" in why_unsafe(root / "cache")


def test_own_links_are_followed(root: Path) -> None:
    (root / "target" / "cache").mkdir(parents=True)
    (root / "first").symlink_to(root / "target")
    (root / "second").symlink_to("first/../first")
    assert why_replaceable(root / "second" / "cache") == ""
    (root / "loop").symlink_to("loop")
    assert "Too many levels" in why_replaceable(root / "loop" / "cache")
    assert "No such file" in why_replaceable(root / "missing" / "below" / "cache")


@as_root
def test_a_link_belongs_to_who_made_it(root: Path) -> None:
    (root / "target").touch(mode=0o600)
    link = root / "link"
    link.symlink_to("target")
    assert why_unsafe(link) == ""
    os.lchown(link, NOBODY, NOBODY)
    assert why_unsafe(link) == f"belongs to user {NOBODY}, not to user 0"


def test_a_folder_of_ones_own_is_no_link(root: Path) -> None:
    (root / "folder").mkdir()
    (root / "link").symlink_to("folder")
    (root / "file").touch()
    assert is_own_folder(root / "folder")
    assert not any(map(is_own_folder, (root / "link", root / "file", root / "missing")))
    (root / "folder").chmod(0o770)
    assert not is_own_folder(root / "folder")
