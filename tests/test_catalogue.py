"""The list of systems: well-formed, so that tables, stores and command lines can rely on it."""

import re

import pytest
import torch

import aftermax
from aftermax import CATALOGUE, Entry, find
from aftermax.dense import as_system

from .contract import LAWS

every_entry = pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)


def test_names_titles_and_systems_are_unique():
    for of in (lambda e: e.name, lambda e: e.title, lambda e: e.system):
        values = [of(entry) for entry in CATALOGUE]
        assert len(set(values)) == len(values)


@every_entry
def test_an_entry_is_well_formed(entry: Entry):
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", entry.name)
    assert entry.arxiv == "" or re.fullmatch(r"\d{4}\.\d{5}", entry.arxiv)
    for text in (entry.title, entry.formula, entry.paper, entry.score, entry.positivity):
        assert text
        assert text == text.strip()
    assert entry.normaliser
    assert entry.claim.endswith(".")


@every_entry
def test_every_exception_names_a_law_and_gives_a_reason(entry: Entry):
    for law, reason in entry.exceptions.items():
        assert law in LAWS
        assert len(reason.split()) > 3


@every_entry
def test_sums_of_one_are_sums_of_at_most_one(entry: Entry):
    assert entry.laws.rows_at_most_one or not entry.laws.rows_sum_to_one


@every_entry
def test_a_system_is_found_by_its_name_and_shown_by_its_constants(entry: Entry):
    assert find(entry.name) is entry
    assert eval(repr(entry.system), vars(aftermax)) == entry.system


@every_entry
def test_a_system_has_the_methods_of_one(entry: Entry):
    system = as_system(entry.system)
    for method in ("learned", "attend", "init_state", "step"):
        assert callable(getattr(system, method))


@every_entry
def test_what_is_learned_starts_the_same_for_every_head_in_float32(entry: Entry):
    for start in as_system(entry.system).learned(3, 5, 5).values():
        assert start.dtype == torch.float32
        if entry.name == "sparsek":  # whose scores all heads share
            continue
        assert start.shape[0] == 3
        if entry.name != "transnormer-lrpe":  # whose angles run on from head to head
            assert torch.equal(start, start[:1].expand_as(start))


def test_an_unknown_name_lists_those_that_there_are():
    with pytest.raises(ValueError, match=r"no system is called 'softmaxx'; .* softmax, log-n, "):
        find("softmaxx")
