"""Which settings the parameters of a run are a function of: those may not change while it lives."""

import dataclasses
import hashlib
import json
from typing import Any

from trainers.settings import ModelSettings, TrainerSettings

NOT_IN_FINGERPRINT = (
    "batching",
    "how",  # the name of "batching" in runs of 0.1.0
    "memory_limit",
    "kind",
    "processes",
    "zero_stage",
    "offload_optimizer",
    "deterministic",
    "timeout_seconds",
    "nodes",
    "rendezvous",
)
"""Keys of [engine]: what came of the first two is in the run's paths, and all engines give one answer, to rounding."""


RECORDED_IN_HISTORY = ("max_rounds_per_update", "idle_updates", "max_skipped", "when_diverged")
"""Keys of [meta] that decide what is then written beside the history, and obeyed whatever they are later."""


class SettingsChanged(ValueError):
    """The run was begun with other settings, which its parameters depend on."""


def reproducibility_key(settings: TrainerSettings) -> dict[str, Any]:
    """Return the settings that the parameters are a function of, as JSON would give them back."""
    chosen = dataclasses.asdict(settings)
    del chosen["checkpoint"]
    for key in RECORDED_IN_HISTORY:
        del chosen["meta"][key]
    chosen["engine"] = _drop_unfingerprinted(chosen["engine"])
    chosen["regret"] = {key: chosen["regret"][key] for key in ("baselines", "options")}
    plain: dict[str, Any] = _tuples_to_lists(chosen)
    return plain


def check_same_settings(before: dict[str, Any], settings: TrainerSettings) -> None:
    """Raise ``SettingsChanged``, naming each difference, when ``before`` would give other parameters.

    A setting that ``before`` does not know had, before there was a choice, its default.
    """
    default = _default(settings)
    before = {section: {**default[section], **old} if isinstance(old, dict) else old for section, old in before.items()}
    before["engine"] = _drop_unfingerprinted(before["engine"])
    changes = [
        f"{section}.{key} was {old!r} and is {new!r}" if key else f"{section} was {old!r} and is {new!r}"
        for section, key, old, new in _differences(before, reproducibility_key(settings))
    ]
    if changes:
        raise SettingsChanged(
            f"this run was begun with other settings: {'; '.join(changes)}. Set them back, give the new run "
            "another run.path, or play the same history with them by `online-meta replay`"
        )


def fingerprint(settings: TrainerSettings) -> str:
    """Return what tells apart settings that give other parameters; one that is new and at its default changes none."""
    default, chosen = _default(settings), reproducibility_key(settings)
    own = {
        section: {k: v for k, v in keys.items() if k not in default[section] or default[section][k] != v}
        for section, keys in chosen.items()
        if isinstance(keys, dict)
    }
    text = json.dumps({**chosen, **own}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _default(settings: TrainerSettings) -> dict[str, Any]:
    return reproducibility_key(TrainerSettings(ModelSettings(settings.model.build)))


def _drop_unfingerprinted(engine: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in engine.items() if key not in NOT_IN_FINGERPRINT}


def _tuples_to_lists(value: Any) -> Any:
    """Turn tuples into lists, as JSON does, so that settings compare equal after a round trip."""
    if isinstance(value, dict):
        return {key: _tuples_to_lists(item) for key, item in value.items()}
    return [_tuples_to_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str, Any, Any]]:
    found: list[tuple[str, str, Any, Any]] = []
    for section in sorted(before.keys() | now.keys()):
        old, new = before.get(section), now.get(section)
        if isinstance(old, dict) and isinstance(new, dict):
            keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            found += [(section, key, old.get(key), new.get(key)) for key in keys]
        elif old != new:
            found.append((section, "", old, new))
    return found
