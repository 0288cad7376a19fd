"""The splitter must never change a byte, and must really cut where it says."""

from __future__ import annotations

import pytest
from replay import GOLDEN, SPLITS, cuts, select


@pytest.mark.parametrize("split", [*SPLITS, "byte", "7"])
@pytest.mark.parametrize("body", ["data: é\r\n\r\ndata: 😀\n\n", "x"])
def test_pieces_put_together_are_the_body(body, split):
    raw = body.encode()
    offsets = cuts(raw, split)
    assert offsets == sorted(set(offsets)) and all(0 < at < len(raw) for at in offsets)


def test_utf8_cuts_are_inside_characters():
    raw = "aé😀".encode()
    assert cuts(raw, "utf8") == [2, 4, 5, 6]


def test_the_selection_is_there():
    assert len(GOLDEN) >= 50
    assert len(select(streams=True)) >= 12 and len(select(streams=False)) >= 24
    assert any("😀" > character > "\x7f" for r in GOLDEN.values() for character in r.body.decode())
