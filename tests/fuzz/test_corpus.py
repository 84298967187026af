"""Every initial input of fuzzing, every input that once broke something, and their mutations pass."""

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.mutators import INSIDE, mutate
from tests.fuzz.seeds import CORPUS, seeds
from tests.fuzz.targets import TARGETS

INPUTS = sorted(path for path in CORPUS.rglob("*") if path.is_file())
MOST_BYTES = 8_000_000
"""The allocation limit of Python and NumPy for an input of a few kB, under limits of 100,000 bytes."""


def test_every_target_has_inputs() -> None:
    assert {path.parent.name for path in INPUTS} == set(TARGETS)
    assert {(target, name) for target, name, _ in seeds()} <= {(path.parent.name, path.name) for path in INPUTS}


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_input_of_the_corpus_passes(path) -> None:
    data = path.read_bytes()
    TARGETS[path.parent.name](data)  # a first run, for one-time allocations
    tracemalloc.start()
    try:
        TARGETS[path.parent.name](data)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("target", TARGETS)
def test_any_bytes_pass(target: str) -> None:
    @settings(max_examples=150, deadline=None)
    @given(st.binary(max_size=300))
    def check(data: bytes) -> None:
        TARGETS[target](data)

    check()


@pytest.mark.parametrize("target", TARGETS)
def test_mutated_inputs_pass(target: str) -> None:
    known = [path.read_bytes() for path in INPUTS if path.parent.name == target]

    @settings(max_examples=150, deadline=None)
    @given(
        st.sampled_from(known),
        st.integers(0, 2**32),
        st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
        st.integers(0, 300),
    )
    def check(data: bytes, seed: int, changes: list[tuple[int, int]], cut: int) -> None:
        def blindly(part: bytes, most: int) -> bytes:
            changed = bytearray(part)
            for at, value in changes:
                if changed:
                    changed[at % len(changed)] = value
            return bytes(changed[: len(changed) - (cut if cut < len(changed) // 2 else 0)])

        TARGETS[target](mutate(target, data, 100_000, seed, blindly))

    check()


@pytest.mark.parametrize("target", INSIDE)
def test_an_inner_mutation_keeps_the_container_valid(target: str) -> None:
    """An unchanged inner part gives the same task, so changes reach the code after lengths and checksums."""
    for name, data in [(name, data) for kind, name, data in seeds() if kind == target]:
        for seed in range(20):
            assert mutate(target, data, 10**6, seed, lambda part, most: part) is not None, name
            TARGETS[target](mutate(target, data, 10**6, seed, lambda part, most: part))
