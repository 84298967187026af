"""Fuzz one target with atheris: ``python -m tests.fuzz.one TARGET [options of libFuzzer] [folders of inputs]``."""

import sys

import atheris

with atheris.instrument_imports(include=["streams", "zipfile", "json", "safetensors"]):
    from tests.fuzz.targets import TARGETS

from tests.fuzz.mutators import mutate


def main() -> None:
    """Fuzz one target. Never returns, because libFuzzer exits the process."""
    name = sys.argv.pop(1)

    def change(data: bytes, most: int, seed: int) -> bytes:
        return mutate(name, data, most, seed, atheris.Mutate)

    atheris.Setup(sys.argv, TARGETS[name], custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
