"""The build's arguments, pip.conf, and what is read from buildx's output (recorded from buildx 0.13)."""

from __future__ import annotations

import configparser

import pytest

from orchestrator.commands import buildx
from orchestrator.commands.buildx import BuildSecret, PipSettings
from orchestrator.commands.dockerignore import compile_ignore

PIP_FAILED = """\
#9 [deps 3/3] RUN --mount=type=bind,source=user sh /mnt/setup.sh user /mnt/user
#9 1.022 Looking in links: /mnt/wheels
#9 1.541 ERROR: Could not find a version that satisfies the requirement nosuchthing==9 (from versions: none)
#9 ERROR: process "/bin/sh -c sh /mnt/setup.sh user /mnt/user" did not complete successfully: exit code: 1
------
 > [deps 3/3] RUN --mount=type=bind,source=user sh /mnt/setup.sh user /mnt/user:
1.022 Looking in links: /mnt/wheels
1.541 ERROR: Could not find a version that satisfies the requirement nosuchthing==9 (from versions: none)
1.541 ERROR: No matching distribution found for nosuchthing==9
------
Dockerfile:46
--------------------
  45 |         sh /mnt/setup/setup.sh packages /mnt/setup/requirements.txt
  46 | >>> RUN --mount=type=bind,source=user,target=/mnt/user
--------------------
ERROR: failed to solve: process "/bin/sh -c sh /mnt/setup.sh user /mnt/user" did not complete successfully: exit code: 1
"""

BASE_MISSING = """\
#2 [internal] load metadata for docker.io/library/nosuchbase:1
#2 ERROR: pull access denied, repository does not exist or may require authorization
------
 > [internal] load metadata for docker.io/library/nosuchbase:1:
------
Dockerfile:15
--------------------
  15 | >>> FROM ${BASE_IMAGE} AS system
--------------------
ERROR: failed to solve: nosuchbase:1: pull access denied, repository does not exist or may require authorization
"""


def test_argv_is_complete_and_holds_no_secret():
    argv = buildx.build_argv(
        "localhost:5001/a/b:t",
        dockerfile="images/Dockerfile",
        target="deps",
        build_args={"BASE_IMAGE": "x y", "HTTPS_PROXY": None},
        labels={"orch.content": "t"},
        secrets=[BuildSecret("pip", env="ORCH_PIP_CONFIG"), BuildSecret("ca", src='/a,b/"c".pem')],
        platform="linux/amd64",
    )
    assert argv[:3] == ["docker", "buildx", "build"]
    assert argv[-1] == "-"
    for flag, value in [
        ("-f", "images/Dockerfile"),
        ("-t", "localhost:5001/a/b:t"),
        ("--target", "deps"),
        ("--platform", "linux/amd64"),
        ("--label", "orch.content=t"),
    ]:
        assert argv[argv.index(flag) + 1] == value
    assert [argv[at + 1] for at, word in enumerate(argv) if word == "--build-arg"] == ["BASE_IMAGE=x y", "HTTPS_PROXY"]
    secrets = [argv[at + 1] for at, word in enumerate(argv) if word == "--secret"]
    assert secrets == ["id=pip,env=ORCH_PIP_CONFIG", 'id=ca,"src=/a,b/""c"".pem"']
    assert "'BASE_IMAGE=x y'" in buildx.render(argv)


def test_pip_config_reads_back():
    settings = PipSettings(
        index_url="https://user:p%40ss@index.example/simple",
        extra_index_urls=("https://one.example/", "https://two.example/"),
        trusted_hosts=("index.example",),
        find_links=("/only/on/this/machine", "https://links.example/"),
        timeout="180",
    )
    parser = configparser.RawConfigParser()
    parser.read_string(settings.config(wheels="/mnt/wheels"))
    values = dict(parser.items("global"))
    assert values["index-url"] == "https://user:p%40ss@index.example/simple"
    assert values["extra-index-url"].split() == ["https://one.example/", "https://two.example/"]
    assert values["find-links"].split() == ["/mnt/wheels", "https://links.example/"]
    assert values["timeout"] == "180"
    assert PipSettings().config() == "[global]\n"


def test_failure_names_step_reason_and_last_lines():
    found = buildx.parse_failure(PIP_FAILED)
    assert found.step.startswith("deps 3/3 RUN ")
    assert found.reason.endswith("did not complete successfully: exit code: 1")
    assert found.lines[-1] == "ERROR: No matching distribution found for nosuchthing==9"
    assert not any(line.startswith("Dockerfile") for line in found.lines)
    assert "image.wheels" in (buildx.advise(PIP_FAILED) or "")


def test_failure_in_terminal_output_with_colours():
    dressed = (
        PIP_FAILED.replace("\n", "\r\n").replace(" > [", "\x1b[31m > [").replace("exit code: 1", "exit code: 1\x1b[0m")
    )
    assert buildx.parse_failure(dressed) == buildx.parse_failure(PIP_FAILED)


def test_failure_without_a_step():
    found = buildx.parse_failure(BASE_MISSING)
    assert found.step == "internal load metadata for docker.io/library/nosuchbase:1"
    assert "pull access denied" in found.reason
    assert "image.base" in (buildx.advise(BASE_MISSING) or "")
    assert buildx.parse_failure("") == buildx.Failure()
    assert buildx.parse_failure("#1 x\nERROR: boom\n").reason == "boom"


@pytest.mark.parametrize(
    ("output", "word"),
    [
        ("write /var/lib/docker/x: no space left on device", "disk"),
        ("ERROR: Cannot connect to the Docker daemon at unix:///var/run/docker.sock.", "start Docker"),
        ("docker: 'buildx' is not a docker command.", "docker-buildx"),
        ("docker: unknown command: docker buildx", "docker-buildx"),
        ("unknown shorthand flag: 'f' in -f", "docker-buildx"),
        ("SSLError(SSLCertVerificationError(1, 'certificate verify failed'))", "image.ca_bundle"),
        (
            "permission denied while trying to connect to the Docker daemon socket at docker.sock: permission denied",
            "group",
        ),
    ],
)
def test_advice(output: str, word: str):
    assert word in (buildx.advise(output) or "")


def test_a_missing_plugin_is_told_from_a_failed_build():
    assert buildx.lacks_plugin("unknown flag: --load\n\nUsage:  docker [OPTIONS] COMMAND")
    assert not buildx.lacks_plugin(PIP_FAILED)


def test_no_advice_where_nothing_is_known():
    assert buildx.advise("something else") is None


def test_inspect_takes_short_names_of_the_default_registry():
    output = '["orch-deps:1","team/x:2"]["team/x@sha256:ab"]\n["python:3"][]\n'
    wanted = ["orch-deps:1", "docker.io/team/x:2", "docker.io/library/python:3", "orch-deps:2"]
    assert buildx.parse_inspect(output, wanted) == set(wanted[:3])


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("docs", ["docs", "docs/a/b.md"], ["src/docs", "docs2/a"]),
        ("/docs/", ["docs/a"], ["src/docs/a"]),
        ("./docs", ["docs/a"], []),
        ("*.md", ["a.md"], ["sub/a.md", "a.mdx"]),
        ("**/*.md", ["a.md", "sub/deep/a.md"], ["a.mdx"]),
        ("a/**/z", ["a/z", "a/b/z", "a/b/c/z/x"], ["z", "ab/z"]),
        ("a/**", ["a/b", "a/b/c"], ["b/a"]),
        ("file?.txt", ["file1.txt"], ["file.txt", "file/.txt"]),
        ("[ab].py", ["a.py"], ["c.py"]),
        ("[^ab].py", ["c.py"], ["a.py"]),
        (r"a\*b", ["a*b"], ["axb"]),
        ("a.b(c)+", ["a.b(c)+"], ["aXb(c)+", "a.bcc"]),
        ("# comment", [], ["# comment", "comment"]),
        ("", [], ["a"]),
        (".", [], ["a"]),
    ],
)
def test_dockerignore(pattern: str, yes: list[str], no: list[str]):
    ignored = compile_ignore(pattern)
    assert [path for path in yes if not ignored(path)] == []
    assert [path for path in no if ignored(path)] == []


def test_dockerignore_the_last_match_decides():
    ignored = compile_ignore("\ufeff*\n!src\n!README*\nsrc/secret\n  !src/secret/ok  \n")
    kept = ["src/a.py", "README.md", "src/secret/ok"]
    assert [path for path in kept if ignored(path)] == []
    assert ignored("other.py") and ignored("src/secret/x") and ignored("data/big")
