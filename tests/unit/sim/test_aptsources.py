"""Package sources: both of apt's formats, and the derivation of another suite's."""

from __future__ import annotations

from orchestrator.sim.aptsources import Source, derive, os_release, parse, render

DEB822 = """\
Types: deb deb-src
# http://mirror.test/snapshot
URIs: http://mirror.test/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.test/debian-security
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc: def
 -----END PGP PUBLIC KEY BLOCK-----

Types: deb
Enabled: no
URIs: http://off.test/debian
Suites: bookworm
Components: main

Types: deb-src
URIs: http://src.test/debian
Suites: bookworm
Components: main
"""

ONE_LINE = """\
# deb http://comment.test/debian bookworm main
deb [arch=amd64 signed-by=/k.gpg] http://mirror.test/debian bookworm main non-free # why
deb-src http://mirror.test/debian bookworm main
deb http://mirror.test/debian stable-updates main
deb [trusted=yes] file:/srv/mirror bookworm main
deb http://third.test/linux/debian bookworm stable
deb http://pg.test/apt bookworm-pgdg main
"""

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def test_deb822_gives_one_source_per_uri_and_suite_and_leaves_out_what_is_off() -> None:
    found = parse(DEB822, deb822=True)
    assert found == [
        Source("http://mirror.test/debian", "bookworm", ("main", "contrib"), KEYRING),
        Source("http://mirror.test/debian", "bookworm-updates", ("main", "contrib"), KEYRING),
        Source("http://mirror.test/debian-security", "bookworm-security", ("main",), ""),
    ]


def test_one_line_format_with_options_and_comments() -> None:
    found = parse(ONE_LINE, deb822=False)
    assert found[0] == Source("http://mirror.test/debian", "bookworm", ("main", "non-free"), "/k.gpg")
    assert [source.suite for source in found] == ["bookworm", "stable-updates", "bookworm", "bookworm", "bookworm-pgdg"]
    assert found[2].trusted


def test_derive_keeps_mirror_and_keyring_and_leaves_third_parties_out() -> None:
    derived = derive(parse(ONE_LINE, deb822=False), "bookworm", "trixie")
    assert [source.line() for source in derived] == [
        "deb [signed-by=/k.gpg] http://mirror.test/debian trixie main",
        "deb http://mirror.test/debian trixie-updates main",
        "deb [trusted=yes] file:/srv/mirror trixie main",
    ]


def test_derive_for_the_same_suite_and_for_a_foreign_machine() -> None:
    sources = parse(DEB822, deb822=True)
    assert [source.suite for source in derive(sources, "bookworm", "bookworm")] == [
        "bookworm",
        "bookworm-updates",
        "bookworm-security",
    ]
    assert derive(sources, "noble", "trixie") == []


def test_render_can_be_read_again() -> None:
    derived = derive(parse(DEB822, deb822=True), "bookworm", "trixie")
    assert parse(render(derived), deb822=False) == derived


def test_os_release_unquotes() -> None:
    assert os_release('ID=debian\n# x\nNAME="Debian GNU/Linux"\nEMPTY=\n') == {
        "ID": "debian",
        "NAME": "Debian GNU/Linux",
        "EMPTY": "",
    }
