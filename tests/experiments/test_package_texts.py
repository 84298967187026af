"""The table of package descriptions: its tasks, its intervals, and a short run on a few descriptions of Debian 12."""

import math

import pytest

from tests.experiments import package_texts
from tests.experiments.package_texts import (
    CONFIGS,
    CONTESTANTS,
    find_interval,
    make_settings,
    make_texts,
    read_sections,
)

PRINTED = """Package: one
Section: non-free/games
Description: A game of ancient warfare

Package: two
Description-en: A web server
 which is small
Section: web

Package: three
Section: web
Description: A web server

Package: four
Section: oldlibs
Description: A transitional package

Package: five
Section: web
"""
SMALL = {
    "database": [
        "Backup and Recovery Manager for PostgreSQL",
        "Database connectivity drivers for LibreOffice",
        "HSQLDB SDBC driver for LibreOffice",
        "PL/Tcl procedural language for PostgreSQL 15",
        "PostgreSQL Partition Manager",
        "SQL infrastructure for Londiste",
        "high-performance database - SyncML module",
        "high-performance database - binaries",
        "replication manager for PostgreSQL 15",
    ],
    "editors": [
        "Full-screen character mode text editor",
        "Interactively examine a C program source in emacs",
        "Vim plugin to work with Git",
        "Vim script for text filtering and alignment",
        "control a mpv via its IPC interface from Emacs",
        "distraction-free writing for Emacs",
        "document processor",
        "office productivity suite -- equation editor",
        "tool to make (or reverse) a hex dump",
    ],
    "fonts": [
        "75 dpi BIZNET ISO-8859-2 fonts for X servers",
        "Gayathri Malayalam font",
        "Lexi Gulim Korean font",
        "Serif font metric-compatible with the Cambria font",
        "Some Juicy Fonts handwriting fonts",
        "TrueType font based on the old 16x16 Gothic bitmap",
        "font editor - non-X version",
        "font for Roman numeral analysis (music theory)",
        "music notation symbol fonts for Denemo",
    ],
    "games": [
        "3D platform shooting game -- data files",
        "Amazons boardgame for GNOME",
        "Dungeon Crawl, a text-based roguelike game",
        "OpenArena game data",
        "graphics and audio data for etw",
        "pacman-like game, child oriented - data files",
        "surreal platform shooting game",
        "transportation simulator (base data)",
        "turn based strategy board game for up to 4 players",
    ],
    "mail": [
        "Courier mail server - ESMTP daemon",
        "Laptop's Mail LED control for Claws Mail",
        "addons for the OpenSMTPD SMTP server",
        "mail server network protocol front-ends",
        "multi purpose SMTP Proxy",
        "public inbox to local email interface",
        "secure POP3/IMAP server - Sieve filters support",
        "simple email archiver written in perl",
        "tools for encoding/decoding MIME messages",
    ],
    "science": [
        "Atomistic Machine-learning Package (python 3)",
        "Compute astrometric and photometric solutions",
        "Dietary nutrition analysis software",
        "Global and progressive multiple sequence alignment",
        "INDI driver for the WeeWX Weather Station",
        "SAGA GIS architecture independent files",
        "Tool for dynamic flowsheet simulation. GUI",
        "interpretation of DNA Sanger sequencing data",
        "sequence logo generator",
    ],
    "sound": [
        "Sound Manipulation Program",
        "Vorbis audio encoder add-on for Kodi",
        "audio test signals meter",
        "console based player for Pandora radio",
        "digital audio synthesizer",
        "old-school drum-kit sampler - standalone",
        "real time audio synthesis server",
        "tool to check mp3 files for consistency",
        "two oscillators software synthesizer",
    ],
    "web": [
        "Chat application for Yaws webserver",
        "Java word processor based on HTML and CSS",
        "Pastebin with syntax highlighting (cli tool)",
        "Syntax highlighting in MediaWiki's wikitext editor",
        "Web content filtering (Dansguardian fork)",
        "assertion library for Node.js",
        "blog aware, static website generator",
        "web interface for graphing of monitoring systems",
        "website engine for collaborative work",
    ],
}


def test_sections_have_their_different_descriptions():
    assert read_sections(PRINTED) == {"games": ["A game of ancient warfare"], "web": ["A web server"]}


def test_a_task_has_different_texts_of_different_sections():
    section_of = {text: name for name, texts in SMALL.items() for text in texts}
    for t in range(20):
        support, query = make_texts(SMALL, 3, t)
        assert (support, query) == make_texts(SMALL, 3, t)
        assert len({*support, *query}) == 40
        sections = [section_of[text] for text in support]
        assert [sections[5 * k] for k in range(5)] == [section_of[text] for text in query[::3]]
        assert all(len({*sections[5 * k : 5 * k + 5]}) == 1 for k in range(5))
        assert len({*sections}) == 5
    assert make_texts(SMALL, 3, 0) != make_texts(SMALL, 4, 0)


def test_the_interval_is_where_the_test_of_a_share_stops_rejecting():
    for share, count in ((0.7, 600), (0.5, 10), (0.0, 20)):
        for end in find_interval(share, count):
            assert abs(share - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / count), abs=1e-9)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_contestant_plays(kind, tmp_path):
    settings = make_settings(tmp_path, kind, 0)
    heads = {f"ftml@{rule}" for rule in settings.inner.answer_heads}
    names = {learner.name for learner in settings.learner} | {"ftml", "pool"}
    assert names | heads == CONTESTANTS[kind].keys()


def test_a_frozen_encoder_tells_sections_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(package_texts, "read_own_lists", lambda: SMALL)
    monkeypatch.setattr(package_texts, "SERVED", 1)
    row = package_texts.play("frozen", 0, 3, tmp_path)
    assert row["accuracies"].keys() == row["losses"].keys() == CONTESTANTS["frozen"].keys()
    assert sum(row["accuracies"]["ftml@ridge_head"]) / 3 > 0.6
    assert all(value > 0 for value in row["milliseconds"].values())
    assert package_texts.play("frozen", 0, 3, tmp_path) == row
