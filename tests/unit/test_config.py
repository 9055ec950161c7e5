"""orch.yaml: what is accepted, how mistakes are told, and the job that comes out of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config import job_name, job_spec, load, parse_sets, recipe_argument, recipes
from orchestrator.config.job import set_value
from orchestrator.errors import ConfigError, UsageError
from orchestrator.files import parse_env
from orchestrator.specs import ImageRef, Mount, Node, Secret

NODES = (Node("n1", "10.0.0.1"), Node("n2", "10.0.0.2"))
RUN_ID = "job-20260101-000000-abcd"

FULL = """
name: myjob
image:
  repository: registry.example.com/team/myjob
  context: .
  variant: cuda
  build_args: {A: 1}
run:
  recipe: own
  set: {train.steps: 3, data.split: "1"}
  env: {LEVEL: 2}
  secrets: [HF_TOKEN]
  mounts: [{source: /data, target: /data/, readonly: true}]
  port: 29400
  shm: 8g
storage: {kind: local, runs: ~/.orch/runs, checkpoints: null, cache: ~/.orch/cache}
local: {python: .venv-trainer/bin/python}
targets:
  default: h100
  h100: {backend: ssh, inventory: inventory/h100.yaml}
  sim: {backend: ssh, inventory: inventory/sim.yaml, gpus: 0, procs: 2}
  uni: {backend: slurm, login: hpc, container: apptainer, shared: $SCRATCH/orch, prologue: [module load apptainer],
        sbatch: {partition: gpu, time: "24:00:00", exclusive: true}}
"""


@pytest.fixture
def project(tmp_path: Path):
    def write(text: str = "") -> Path:
        (tmp_path / "recipes").mkdir(exist_ok=True)
        (tmp_path / "recipes" / "own.yaml").write_text("task: pretrain\n")
        (tmp_path / "orch.yaml").write_text(text)
        return tmp_path / "orch.yaml"

    return write


def problems(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path)
    error = caught.value
    assert error.exit_code == 2
    assert "\n" not in error.message
    assert str(path) in error.message
    return list(error.lines) or [error.message.split(f"{path}: ", 1)[1]]


def spec_of(path: Path, **more):
    config = load(path)
    values = {"run_id": RUN_ID, "operator": "me@here", "target": config.target(more.pop("on", None)), "nodes": NODES}
    return job_spec(config, **{**values, "secrets": {}, **more})


# --- reading -------------------------------------------------------------------------------------------------------


def test_the_contract_example_loads_and_paths_are_resolved(project):
    path = project(FULL)
    config = load(path)
    root = path.parent
    assert config.image.context == root
    assert config.local.python == root / ".venv-trainer/bin/python"
    assert config.targets["h100"].inventory == root / "inventory/h100.yaml"
    assert config.storage_spec().runs == "~/.orch/runs"
    assert config.storage_spec().checkpoint_root == "~/.orch/checkpoints"
    assert config.image.build_args == {"A": "1"} and config.run.env == {"LEVEL": "2"}
    assert config.target().name == "h100" and config.target("sim").procs == 2
    assert config.target("uni").sbatch == {"partition": "gpu", "time": "24:00:00", "exclusive": True}


def test_found_by_walking_up_and_defaults_without_a_file(project, tmp_path, monkeypatch):
    path = project("name: up\n")
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert load().path == path
    assert load().root == tmp_path
    path.unlink()
    config = load(start=deep)
    assert config.path is None and config.root == deep
    assert config.target().backend == "ssh"
    with pytest.raises(ConfigError, match=r"there is no orch\.yaml"):
        config.inventory_path(config.target())
    with pytest.raises(ConfigError, match=r"image\.repository is missing"):
        config.repository()


def test_a_given_file_must_exist(tmp_path):
    with pytest.raises(ConfigError, match="there is no configuration file"):
        load(tmp_path / "none.yaml")


@pytest.mark.parametrize("text", ["", "# nothing\n", "run:\ntargets:\n", "image:\n"])
def test_empty_files_and_sections_are_the_defaults(project, text):
    assert load(project(text)).run.port == 29400


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("imgae: {}", "imgae: unknown key 'imgae'; did you mean 'image'? (valid: image, local, name, run, storage"),
        ("image: {repositry: a/b}", "image.repositry: unknown key 'repositry'; did you mean 'repository'?"),
        ("run: {sett: {}}", "run.sett: unknown key 'sett'; did you mean 'set'?"),
        ("run: {mounts: [{source: /a, target: /b, readonl: 1}]}", "run.mounts.0.readonl: unknown key 'readonl'"),
        ("targets: {a: {inventry: x}}", "targets.a.inventry: unknown key 'inventry'; did you mean 'inventory'?"),
        ("targets: {a: {name: x}}", "targets.a.name: unknown key 'name'"),
        ("targets: {default: simm, sim: {}}", "targets.default: unknown target 'simm'; did you mean 'sim'?"),
        ("default_target: a", "default_target: unknown key"),
        ("targets: {a: 3}", "targets.a: "),
        ("run: {port: many}", "run.port: input should be a valid integer, unable to parse string as an integer (found"),
        ("run: {port: 70000}", "run.port: input should be less than or equal to 65535"),
        ("run: {shm: lots}", "run.shm: 'lots' is not of the form 8g"),
        ("run: [1]", "run: "),
        ("run: {recipe: a, command: b}", "run: recipe and command cannot both be given"),
        ("run: {command: 'a \"b'}", "run.command: not a command line"),
        ("run: {env: {A: yes}}", "run.env.A: True is not text; put it in quotes"),
        ("run: {env: {1A: x}}", "run.env.1A: '1A' cannot be the name of an environment variable"),
        ("run: {env: {ORCH_RUN_ID: x}}", "belongs to orch"),
        ("run: {env: {T: x}, secrets: [T]}", "run: T is in env and in secrets"),
        ("run: {mounts: [{source: data, target: /d}]}", "run.mounts.0.source: 'data' must be absolute"),
        ("run: {mounts: [{source: /d, target: /orch/x}]}", "run.mounts.0.target: /orch in the container"),
        ("run: {mounts: [{source: /a, target: /d}, {source: /b, target: /d/}]}", "two mounts have the target /d"),
        ("storage: {kind: nfs}", "storage.kind: input should be 'local' or 'shared' (found 'nfs')"),
        ("storage: {runs: runs}", "storage.runs: 'runs' must be absolute or begin with ~/"),
        ("image: {repository: 'Reg/Name:tag'}", "image.repository: 'Reg/Name:tag' is not a repository"),
        ("targets: {l: {backend: ssh, login: x}}", "targets.l: login is for backend slurm, this is backend ssh"),
        ("targets: {l: {backend: k8s}}", "targets.l.backend: input should be 'ssh', 'local' or 'slurm' (found 'k8s')"),
        ("name: 'a $(reboot)'", "name: 'a $(reboot)' cannot name a run"),
        ("name: a\nname: b", "key 'name' is given twice"),
        ("- a\n- b", "expected a mapping of keys, found a list"),
    ],
)
def test_every_mistake_names_its_key(project, text, expected):
    with pytest.raises(ConfigError) as caught:
        load(project(text))
    assert expected in caught.value.message
    assert not caught.value.lines


def test_all_problems_are_reported_together(project):
    found = problems(project("imge: {}\nrun: {port: x, envv: {}}\ntargets: {default: b, a: {gpus: -1}}\n"))
    assert len(found) == 5
    for key in ("imge", "run.port", "run.envv", "targets.default", "targets.a.gpus"):
        assert any(line.startswith(f"{key}: ") for line in found), key


def test_yaml_mistakes_have_a_position(project):
    path = project("run:\n  env: {A: 1\n")
    with pytest.raises(ConfigError, match=rf"{path}:3:1: "):
        load(path)


SECTIONS = ["name", "image", "run", "storage", "local", "targets", "default", "env", "mounts", "set", "a", "\n"]
SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
INNER = st.dictionaries(st.sampled_from(SECTIONS), SCALARS | st.lists(SCALARS, max_size=2), max_size=3)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from(SECTIONS) | st.integers(), SCALARS | INNER, max_size=4))
def test_whatever_stands_in_the_file_gives_a_config_or_a_config_error(document):
    from orchestrator.config.load import parse

    try:
        parse(document, Path("/x/orch.yaml"), root=Path("/x"))
    except ConfigError as error:
        assert "\n" not in error.message


# --- targets -------------------------------------------------------------------------------------------------------


def test_targets(project):
    config = load(project("targets: {sim: {gpus: 0}, other: {}}\n"))
    with pytest.raises(UsageError, match=r"which target\? \(local, other, sim\)"):
        config.target()
    with pytest.raises(UsageError, match="unknown target 'smi'; did you mean 'sim'"):
        config.target("smi")
    assert config.target("local").backend == "local"
    assert load(project("targets: {only: {}}\n")).target().name == "only"


def test_slurm_is_known_but_not_available(project):
    with pytest.raises(ConfigError, match="backend slurm is not available in this version"):
        spec_of(project(FULL), on="uni")


# --- secrets and environment ---------------------------------------------------------------------------------------


def test_secrets_come_from_the_environment_then_the_file(project, tmp_path):
    path = project("run: {secrets: [A, B], secrets_file: s.env}\n")
    file = tmp_path / "s.env"
    file.write_text("A=file\nB='two words'\n")
    file.chmod(0o600)
    assert load(path).secrets({"A": "env"}) == {"A": Secret("env"), "B": Secret("two words")}
    file.chmod(0o640)
    with pytest.raises(ConfigError, match=r"can be read by others \(mode 0640\)") as caught:
        load(path).secrets({"A": "x", "B": "y"})
    assert caught.value.hint == f"chmod 600 {file}"
    file.unlink()
    with pytest.raises(ConfigError, match="no such file"):
        load(path).secrets({})


def test_a_missing_secret_is_named(project):
    with pytest.raises(ConfigError, match=r"run\.secrets: HF_TOKEN is in neither"):
        load(project("run: {secrets: [HF_TOKEN]}\n")).secrets({})


def test_env_file_below_env_below_the_command_line(project, tmp_path):
    path = project("run: {recipe: own, env_file: e.env, env: {B: yaml, C: yaml}}\n")
    (tmp_path / "e.env").write_text("A=file\nB=file\n")
    assert spec_of(path, env={"C": "cli"}).env == {"A": "file", "B": "yaml", "C": "cli"}
    with pytest.raises(ConfigError, match="ORCH_RUN_ID"):
        spec_of(path, env={"ORCH_RUN_ID": "x"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A=1\n", {"A": "1"}),
        ("export A=1\n\n# c\nB=2 # c\n", {"A": "1", "B": "2"}),
        ("A=a#b\n", {"A": "a#b"}),
        ("A=$(x) $HOME\n", {"A": "$(x) $HOME"}),
        ("A='a # b'\n", {"A": "a # b"}),
        ('A="a\nb"\nB=1\n', {"A": "a\nb", "B": "1"}),
        ("A=\nB=''\n", {"A": "", "B": ""}),
        ("A=x=y\n", {"A": "x=y"}),
    ],
)
def test_env_files(text, expected):
    assert parse_env(text, Path("e")) == expected


@pytest.mark.parametrize("text", ["A\n", "1A=2\n", "A='x\n", "A='x' y\n", "=x\n"])
def test_bad_env_files_name_the_line(text):
    with pytest.raises(ConfigError, match=r"^e:1: "):
        parse_env(text, Path("e"))


# --- the job -------------------------------------------------------------------------------------------------------


def test_a_recipe_becomes_the_trainers_command(project):
    spec = spec_of(project(FULL), on="sim", sets=["train.steps=9", "text=a b=$(c)"])
    assert spec.command == (
        *("-m", "trainer", "run", "--config", "recipes/own.yaml"),
        *("train.steps=9", 'data.split="1"', "text=a b=$(c)"),
    )
    assert spec.stop == "file" and spec.launcher == "torchrun"
    assert (spec.gpus, spec.procs, spec.backend) == (0, 2, "ssh")
    assert spec.mounts == (Mount("/data", "/data", True),)
    assert (spec.name, spec.series, spec.run_id) == ("myjob", RUN_ID, RUN_ID)


def test_a_given_name_is_also_the_series_of_checkpoints(project):
    path = project(FULL)
    assert spec_of(path, name="Long-Run").series == "long-run"
    assert spec_of(path, series="other").series == "other"
    with pytest.raises(UsageError, match=r"cannot name a run.*for example 'a-b'"):
        spec_of(path, name="a b")


def test_name_falls_back_to_the_folder(project):
    config = load(project(""))
    assert job_name(config) and job_name(config, "x.1") == "x.1"


def test_sets_of_the_file_belong_to_its_recipe_only(project, tmp_path):
    path = project("run: {recipe: own, set: {a: 1}}\n")
    (tmp_path / "recipes" / "second.yaml").write_text("")
    assert spec_of(path).command[-1] == "a=1"
    assert spec_of(path, recipe="second").command[-1] == "recipes/second.yaml"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["train.py", "--lr", "1e-4"], ("train.py", "--lr", "1e-4")),
        (["python", "train.py"], ("train.py",)),
        (["/usr/bin/python3.11", "-m", "pkg"], ("-m", "pkg")),
        (["torchrun", "train.py", "a b", "$(x)"], ("train.py", "a b", "$(x)")),
    ],
)
def test_a_command_loses_its_python(project, command, expected):
    spec = spec_of(project(FULL), command=command)
    assert spec.command == expected
    assert spec.stop == "signal"


def test_without_torchrun_the_command_is_kept_and_runs_once(project):
    spec = spec_of(project(""), command=["python", "x.py"], launcher="none", procs=4)
    assert spec.command == ("python", "x.py") and spec.procs == 1 and spec.world_size == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"recipe": "own", "command": ["x.py"]}, "--recipe and a command after -- cannot both be given"),
        ({"command": ["x.py"], "sets": ["a=1"]}, "--set changes a recipe"),
        ({"command": ["torchrun", "--nnodes=2", "x.py"]}, "torchrun's own option '--nnodes=2'"),
        ({"command": ["python"]}, "is no command"),
        ({"recipe": "onw"}, "unknown recipe 'onw'; did you mean 'own'"),
        ({"recipe": "own", "launcher": "none"}, "a recipe needs torchrun"),
        ({"recipe": "own", "launcher": "torchrn"}, "unknown launcher 'torchrn'; did you mean 'torchrun'?"),
        ({}, "nothing to run"),
        ({"recipe": "own", "sets": ["novalue"]}, "--set 'novalue' is not of the form key=value"),
        ({"recipe": "own", "sets": ["a b=1"]}, "is not a recipe's key"),
        ({"recipe": "own", "nodes": ()}, "no nodes to run on"),
        ({"recipe": "own", "procs": 0}, "at least one process"),
        ({"recipe": "own", "gpus": -1}, "cannot be negative"),
    ],
)
def test_what_cannot_be_run(project, more, message):
    with pytest.raises(UsageError) as caught:
        spec_of(project(""), **more)
    assert message in caught.value.message
    assert caught.value.exit_code == 2


def test_gpus_and_processes(project):
    path = project("run: {recipe: own}\ntargets: {g: {gpus: 4, procs: 2}, n: {}}\n")
    eight = tuple(Node(f"g{i}", f"h{i}", gpus=8) for i in range(2))
    assert (spec_of(path, on="n").gpus, spec_of(path, on="n").procs) == (0, 1)
    assert (spec_of(path, on="n", nodes=eight).gpus, spec_of(path, on="n", nodes=eight).procs) == (8, 8)
    assert (spec_of(path, on="g", nodes=eight).gpus, spec_of(path, on="g", nodes=eight).procs) == (4, 4)
    assert (spec_of(path, on="g", gpus=0).gpus, spec_of(path, on="g", gpus=0).procs) == (0, 2)
    assert spec_of(path, on="g", gpus=2, procs=1, nodes=eight).procs == 1
    with pytest.raises(UsageError, match="node g0 has 8 in the inventory"):
        spec_of(path, on="n", gpus=9, nodes=eight)
    with pytest.raises(UsageError, match=r"the nodes differ in GPUs \(g0 8, n1 0\)"):
        spec_of(path, on="n", nodes=(eight[0], NODES[0]))


def test_image_and_secrets_pass_through(project):
    image = ImageRef("r/x", "t", "sha256:1")
    spec = spec_of(project(FULL), image=image, secrets={"HF_TOKEN": Secret("s3cret")})
    assert spec.image == image
    assert "s3cret" not in repr(spec)


def test_recipes_are_ours_and_the_contexts(project):
    config = load(project(""))
    assert recipes(config)["own"] == config.root / "recipes" / "own.yaml"
    assert recipe_argument(config, "recipes/own.yaml") == "recipes/own.yaml"


def test_repeated_sets_last_wins():
    assert list(parse_sets(["a=1", "b=2", "a=3"]).items()) == [("b", "2"), ("a", "3")]


@settings(deadline=None, max_examples=60)
@given(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]))
    | st.lists(st.integers())
    | st.floats(allow_nan=False, allow_infinity=False)
)
def test_values_of_set_are_read_back_as_they_were(value):
    read = yaml.safe_load(set_value(value))
    assert read == value
