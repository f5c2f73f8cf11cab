"""Every law over every entry of the catalogue."""

import dataclasses

import pytest

from aftermax import CATALOGUE, Entry
from aftermax.entry import Laws

from .contract import LAWS, hold
from .naive import NAIVE
from .weight_laws import DECLARED


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)
@pytest.mark.parametrize("law", LAWS)
def test_law(entry: Entry, law: str):
    hold(entry, law)


@pytest.mark.parametrize(
    ("entry", "law"),
    [
        pytest.param(entry, law, id=f"{entry.name}-{law}")
        for entry in CATALOGUE
        for law in DECLARED
        if getattr(entry.laws, law)
    ],
)
def test_declared_law(entry: Entry, law: str):
    DECLARED[law](entry)


def test_every_entry_has_a_naive_equation():
    assert set(NAIVE) == {entry.name for entry in CATALOGUE}


def test_every_field_of_laws_is_tested():
    assert {field.name for field in dataclasses.fields(Laws)} == set(DECLARED) | {"length_aware"}


def test_an_exception_from_no_law_is_an_error():
    entry = dataclasses.replace(CATALOGUE[0], exceptions={"gravity": "it floats"})
    with pytest.raises(AssertionError, match="softmax excepts itself from no law: gravity"):
        hold(entry, "equation")


def test_a_declared_exception_is_skipped_with_its_reason():
    entry = dataclasses.replace(CATALOGUE[0], exceptions={"prefix": "it looks ahead"})
    with pytest.raises(pytest.skip.Exception, match="softmax cannot keep prefix: it looks ahead"):
        hold(entry, "prefix")
