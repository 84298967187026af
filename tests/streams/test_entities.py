"""The key of an entity survives in the ids of its tasks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.entities import find_entity, make_entity_id
from streams.formats.wire import is_valid_id
from streams.spec import Limits

KEYS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=15)


@given(KEYS, KEYS)
def test_an_id_is_valid_and_names_its_entity(key, other):
    id = make_entity_id("stores", key, "17")
    assert is_valid_id(id, Limits())
    assert find_entity(id) == key
    assert (make_entity_id("stores", other, "17") == id) == (other == key)


@pytest.mark.parametrize("id", ["sin-3", "stores..x", "a..b_zz..3", "a..b_ff..3", "....3", "a..b.."])
def test_another_id_names_no_entity(id):
    assert find_entity(id) is None


def test_a_task_that_is_submitted_again_keeps_its_entity():
    assert find_entity(make_entity_id("stores", "Café 7", "17") + ".retry-5") == "Café 7"


def test_an_empty_key_is_refused():
    with pytest.raises(ValueError, match="empty"):
        make_entity_id("stores", "", "17")
