"""launch_tpu.sh against a gcloud that is a small program of this file: it records every call, keeps a slice whose
workers are folders of this machine (commands sent by ssh really run there), and fails on cue.
"""

import ast
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest

from lm.experiment import Experiment
from lm.flags import resolve

ROOT = pathlib.Path(__file__).parent.parent.parent
SCRIPT = ROOT / "launch_tpu.sh"

pytestmark = pytest.mark.system

# Starts in 6 ms: it is called some three hundred times.
GCLOUD = '''\
#!{python} -ISE
import os, sys, time

here = "{here}"
state = eval(open(here + "/state").read())
words = sys.argv[1:]
with open(here + "/calls", "a") as calls:
    calls.write(repr(words) + "\\n")
flags = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
room, verb = (words[2:4] if words[0] == "compute" else words[:2])


def end(status=0, error=""):
    mine = here + "/state." + str(os.getpid())
    with open(mine, "w") as file:
        file.write(repr(state))
    os.replace(mine, here + "/state")
    sys.stdout.flush()
    if error:
        print(error, file=sys.stderr)
    os._exit(status)


def wipe():
    """The machines are gone, with everything that ran there and lay there."""
    for worker in range(state["workers"]):
        home = here + "/" + str(worker)
        try:
            os.killpg(int(open(home + "/lm-run/pid").read().split()[0]), 9)
        except (OSError, ValueError):
            pass
        run("rm", "-rf", home)


def has_started():
    """Waits until the command runs: what is preempted in these tests is a run, on however slow a machine."""
    for worker in range(state["workers"]):
        while not os.path.exists(here + "/count." + str(worker)):
            time.sleep(0.02)


def run(*words, cwd=here, env=os.environ):
    child = os.fork()
    if not child:
        os.chdir(cwd)
        os.execvpe(words[0], words, env)
    os.waitpid(child, 0)


def missing():
    end(1, "ERROR: (gcloud) NOT_FOUND: Resource projects/p/locations/z was not found")


action = flags.get("command", "").partition("--on_worker ")[2].split(" ")[0].rstrip(";")
for key in (room + " " + verb, action and "ssh " + action):
    cues = state["cues"].get(key)
    cue = cues.pop(0) if cues else None
    if cue and "state" in cue:
        state["slice"] = cue["state"]
        if cue["state"] in ("PREEMPTED", "MISSING"):
            if action == "status":
                has_started()
            wipe()
            if state["queue"]:
                state["queue"] = "SUSPENDED"
    if cue and "queue" in cue:
        state["queue"] = cue["queue"]
    if cue and "fail" in cue:
        end(cue.get("status", 1), cue["fail"])

if room == "queued-resources":
    if verb == "create":
        state["queue"] = "WAITING_FOR_RESOURCES"
    elif not state["queue"]:
        missing()
    elif verb == "describe":
        print(state["queue"])
        after = {{"WAITING_FOR_RESOURCES": "PROVISIONING", "PROVISIONING": "ACTIVE"}}
        state["queue"] = after.get(state["queue"], state["queue"])
        if state["queue"] == "ACTIVE" and state["slice"] == "MISSING":
            state["slice"] = "READY"
    elif verb == "delete":
        wipe()
        state["queue"], state["slice"] = "", "MISSING"
    end()
if (room, verb) == ("storage", "rsync"):
    end()
if verb == "create":
    if state["slice"] != "MISSING":
        end(1, "ERROR: ALREADY_EXISTS: Resource exists")
    state["slice"] = "READY"
    end()
if state["slice"] == "MISSING":
    missing()
if verb == "describe":
    print(state["slice"] + "\\t" + ";".join("10.0.0.%d" % worker for worker in range(state["workers"])))
elif verb == "delete":
    wipe()
    state["slice"] = "MISSING"
elif verb == "start":
    state["slice"] = "READY"
elif verb in ("ssh", "scp"):
    if state["slice"] != "READY":
        end(255, "ssh: connect to host 10.0.0.0 port 22: Connection timed out")
    which = flags["worker"]
    for worker in range(state["workers"]) if which == "all" else [int(which)]:
        home = here + "/" + str(worker)
        os.makedirs(home, exist_ok=True)
        if worker in state["silent"]:
            print("ssh: connection refused", file=sys.stderr)
        elif verb == "ssh":
            path = here + "/machine:/usr/bin:/bin"
            run("bash", "-c", flags["command"], cwd=home, env={{"HOME": home, "PATH": path, "WORKER": str(worker)}})
        else:
            source, target = [word for word in words[4:] if not word.startswith("--")]
            if ":" in target:
                run("cp", source, home + "/" + target.partition(":")[2])
            else:
                run("cp", "-r", home + "/" + source.partition(":")[2], target, cwd=os.getcwd())
else:
    end(2, "the gcloud of the test does not know " + " ".join(words))
end()
'''

# Stands for the Python of the VM and of the environment made with it; writes down what pip was asked for.
PYTHON = """\
#!/bin/bash
if [[ $1 == -c ]]; then [[ $2 == *ensurepip* ]]; exit; fi
if [[ $2 == venv ]]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; else echo "$@" >>~/pip; fi
"""

# Stands for the metadata server of a VM: each line of ~/notices is one answer about preemption; the rest is silence.
# What waits for a change waits until the command runs.
CURL = """\
#!/bin/bash
case "${*: -1}" in
  */maintenance-event*) echo NONE && sleep 0.1 ;;
  */preempted*)
    if [[ ! -s ~/notices ]]; then exit 7; fi
    answer=$(head -n 1 ~/notices)
    if [[ $* == *wait_for_change=true* && $answer == TRUE ]]; then
      until grep -q running ~/lm-run/log; do sleep 0.02; done
    fi
    sed -i 1d ~/notices
    echo "$answer"
    ;;
esac
"""

# What runs on the workers: its Nth start ends with the Nth status, or hangs until it is asked to stop.
COMMAND = """\
#!/bin/bash
count=$(cat "{here}/count.$WORKER" 2>/dev/null || echo 0)
echo $((count + 1)) >"{here}/count.$WORKER"
ends=({ends})
mkdir -p runs/one && echo result >runs/one/result
echo "worker $WORKER start $count of: $*"
end=${{ends[$count]}}
# worker0:1,worker1:hang
other=${{end#*worker1:}}
if [[ $end == worker* ]]; then end=${{end#*"worker$WORKER:"}} && end=${{end%%,*}}; fi
case $end in
  # Who waited in vain for another one ends after it.
  69) if [[ $other == [0-9]* ]]; then until [[ -s {here}/1/lm-run/status ]]; do sleep 0.02; done; fi; exit 69 ;;
  hang) trap 'exit 75' TERM; echo running; for _ in {{1..600}}; do sleep 0.05; done ;;
  deaf) echo running; for _ in {{1..600}}; do sleep 0.05; done ;;
  stubborn) trap '' TERM; for _ in {{1..600}}; do sleep 0.05; done ;;
  *) exit "$end" ;;
esac
"""


class Cloud:
    """A project of its own: one slice, its machines, and what was asked of them."""

    def __init__(self, here, tree):
        self.here = here
        self.script = tree / "launch_tpu.sh"
        self.say(slice="MISSING", queue="", workers=1, silent=[], cues={})
        (here / "bin").mkdir()
        (here / "machine").mkdir()
        self._program(here / "bin/gcloud", GCLOUD.format(python=sys.executable, here=here))
        self._program(here / "machine/python3.12", PYTHON)
        self._program(here / "machine/curl", CURL)
        for name in ("gcsfuse", "mountpoint"):
            self._program(here / "machine" / name, f'#!/bin/bash\n[[ $0 == *gcsfuse ]] && echo "$@" >>~/{name}\n')
        self.ends("0")

    @staticmethod
    def _program(path, text):
        path.write_text(text)
        path.chmod(0o755)

    def say(self, **changes):
        old = self.state if (self.here / "state").exists() else {}
        (self.here / "state").write_text(repr(old | changes))

    def cue(self, call, *cues):
        self.say(cues=self.state["cues"] | {call: list(cues)})

    def ends(self, *ends):
        self._program(self.here / "command", COMMAND.format(here=self.here, ends=" ".join(ends)))

    @property
    def state(self):
        return ast.literal_eval((self.here / "state").read_text())

    @property
    def calls(self):
        """Every call as one line, without the flags that say only where and how."""
        lines = (self.here / "calls").read_text().splitlines() if (self.here / "calls").exists() else []
        return [" ".join(ast.literal_eval(line)) for line in lines]

    def count(self, pattern):
        return sum(re.search(pattern, call) is not None for call in self.calls)

    @property
    def starts(self):
        """How often the command was started on each worker."""
        files = sorted(self.here.glob("count.*"))
        return [int(file.read_text()) for file in files]

    def arguments(self, *options, command=None, name="one"):
        command = [str(self.here / "command"), "--workdir=runs/one"] if command is None else command
        quick = ["--poll_seconds=0", "--backoff_seconds=0", "--grace_seconds=2"]
        return [
            str(self.script),
            f"--name={name}",
            "--type=v5e-8",
            *quick,
            *options,
            *(["--", *command] if command else []),
        ]

    @property
    def environment(self):
        return {**os.environ, "PATH": f"{self.here / 'bin'}:{os.environ['PATH']}"}

    def launch(self, *options, command=None):
        return subprocess.run(
            self.arguments(*options, command=command),
            env=self.environment, cwd=self.here, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A working tree that is quickly copied."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("launch_tpu.sh", "setup.py", "constraints-py312.txt"):
        shutil.copy(ROOT / name, folder)
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    return folder


@pytest.fixture
def cloud(tmp_path, tree):
    made = Cloud(tmp_path, tree)
    yield made
    for file in tmp_path.glob("*/lm-run/pid"):
        try:
            os.killpg(int(file.read_text().split()[0]), signal.SIGKILL)
        except (ProcessLookupError, ValueError, IndexError):
            continue


def test_shellcheck_is_content():
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (extra `test`)")
    checked = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_from_nothing_to_the_results_and_nothing_left(cloud):
    ran = cloud.launch("--fetch=got", "--delete_when_done", "--project=p", "--spot", "--create_flag=--reserved")
    assert ran.returncode == 0, ran.stderr
    assert "worker 0 start 0 of: --workdir=runs/one" in ran.stdout
    assert (cloud.here / "got/one/result").read_text() == "result\n"
    assert cloud.state["slice"] == "MISSING"
    (create,) = [call for call in cloud.calls if " create " in call]
    assert create == (
        "compute tpus tpu-vm create one --version=v2-alpha-tpuv5-lite --accelerator-type=v5litepod-8 --reserved --spot "
        "--zone=us-west4-a --project=p"
    )
    assert all("--project=p" in call and "--zone=us-west4-a" in call for call in cloud.calls)


def test_every_worker_gets_tree_environment_and_command(cloud):
    cloud.say(workers=3)
    cloud.script = SCRIPT
    ran = cloud.launch("--bucket=gs://pail")
    assert ran.returncode == 0, ran.stderr
    assert cloud.starts == [1, 1, 1]
    for worker in range(3):
        home = cloud.here / str(worker)
        assert (home / "lm/lm/train.py").read_bytes() == (ROOT / "lm/train.py").read_bytes()
        assert (
            "install --quiet --disable-pip-version-check -c constraints-py312.txt -e .[tpu]"
            in (home / "pip").read_text()
        )
        assert (home / "gcsfuse").read_text().split()[-2:] == ["pail", f"{home}/lm/bucket"]
        assert not (home / "lm/.git").exists()
        assert not (home / "lm/.jax_cache").exists()
    assert "worker 1" not in ran.stdout
    assert "still exists and costs money" in ran.stderr
    assert cloud.count(" delete ") == 0


def test_uncommitted_changes_travel_and_deleted_files_go_but_runs_stay(cloud, tree, tmp_path_factory):
    cloud.script = shutil.copytree(tree, tmp_path_factory.mktemp("own") / "tree") / "launch_tpu.sh"
    here, there = cloud.script.parent, cloud.here / "0/lm"
    for name, text in {"old": "x", "odd name'": "x", ".gitignore": "ignored\n", "ignored": "x"}.items():
        (here / name).write_text(text)
    subprocess.run(["git", "-C", str(here), "add", "-A"], check=True)
    cloud.say(slice="READY")
    cloud.ends("0", "0")
    assert cloud.launch().returncode == 0
    first = {path.name for path in there.iterdir()}
    assert first >= {"old", "odd name'", "runs"}
    assert "ignored" not in first
    (here / "old").unlink()
    (here / "new").write_text("y")
    assert cloud.launch().returncode == 0
    assert {path.name for path in there.iterdir()} == first - {"old"} | {"new"}
    assert (there / "runs/one/result").exists()
    # The environment is made once for the same pinned set.
    assert len((cloud.here / "0/pip").read_text().splitlines()) == 1


def test_words_of_the_command_arrive_as_they_were(cloud):
    words = ["two words", "a'b", '"q"', "$HOME", "*", "--prompt=def f():\n  pass", "back\\slash", ""]
    ran = cloud.launch(command=["/usr/bin/printf", "[%s]", *words])
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "".join(f"[{word}]" for word in words)


def test_dry_run_prints_everything_and_runs_nothing(cloud):
    ran = cloud.launch("--dry_run", "--spot", "--queued", "--bucket=gs://pail", "--fetch=got", "--delete_when_done",
                       command=["python", "-m", "lm.train", "--workdir=bucket/one"])  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert cloud.calls == []
    assert not (cloud.here / "got").exists()
    lines = ran.stdout.splitlines()
    assert all(line.startswith(("gcloud ", "git ls-files ")) for line in lines)
    told = [
        "queued-resources create one",
        "tpu-vm scp lm.tar.gz one:lm.tar.gz",
        "--on_worker prepare pail",
        "--on_worker start python -m lm.train",
        "--on_worker log",
        "--on_worker status",
        "storage rsync --recursive gs://pail/one got/one",
        "queued-resources delete one",
    ]
    for part in told:
        assert any(part in line for line in lines), part


def test_preempted_slice_is_created_again(cloud):
    cloud.ends("hang", "0")
    cloud.cue("ssh status", None, None, {"state": "PREEMPTED"})
    ran = cloud.launch("--spot")
    assert ran.returncode == 0, ran.stderr
    assert "one was preempted; removing what is left" in ran.stderr
    assert "without --bucket" in ran.stderr
    assert cloud.count("tpu-vm create") == 2
    assert cloud.count("tpu-vm delete") == 1
    assert cloud.starts == [2]


def test_preempted_slice_is_left_alone_when_asked(cloud):
    cloud.ends("hang")
    cloud.cue("ssh status", None, None, {"state": "PREEMPTED"})
    ran = cloud.launch("--no_recreate")
    assert ran.returncode == 75
    assert cloud.count(" delete ") == 0


def test_slice_that_somebody_deleted_is_created_again(cloud):
    cloud.ends("hang", "0")
    cloud.cue("ssh status", None, None, {"state": "MISSING"})
    assert cloud.launch().returncode == 0
    assert cloud.count("tpu-vm create") == 2
    assert cloud.count(" delete ") == 0


def test_queued_resource_waits_and_comes_again_after_preemption(cloud):
    cloud.ends("hang", "0")
    cloud.cue("ssh status", None, None, {"state": "PREEMPTED"})
    ran = cloud.launch("--queued", "--spot", "--valid_for=6h")
    assert ran.returncode == 0, ran.stderr
    assert "WAITING_FOR_RESOURCES" in ran.stderr
    assert cloud.count("queued-resources create one --node-id=one .*--spot --valid-until-duration=6h") == 2
    assert cloud.count("queued-resources delete one --force --quiet") == 1
    assert cloud.count("tpu-vm create") == 0


def test_queued_resource_that_fails_ends_it(cloud):
    cloud.cue("queued-resources describe", None, None, {"queue": "FAILED"})
    ran = cloud.launch("--queued")
    assert ran.returncode == 1
    assert "the queued resource one failed" in ran.stderr
    assert cloud.count(" delete ") == 0


def test_quota_ends_it_with_the_reason(cloud):
    reason = "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProjectPerZoneForTPUAPI' has been exceeded."
    cloud.cue("tpu-vm create", {"fail": reason})
    ran = cloud.launch()
    assert ran.returncode == 1
    assert "the quota of the project does not allow v5litepod-8 in us-west4-a" in ran.stderr
    assert "TPUV5sLitepodPerProjectPerZone" in ran.stderr
    assert cloud.count("tpu-vm create") == 1


def test_no_capacity_is_waited_for_and_named(cloud):
    none = {"fail": 'ERROR: {"code": 8, "message": "There is no more capacity in the zone"}'}
    cloud.cue("tpu-vm create", none, none)
    assert cloud.launch().returncode == 0
    assert cloud.count("tpu-vm create") == 3
    cloud.say(slice="MISSING")
    cloud.cue("tpu-vm create", *[none] * 20)
    ran = cloud.launch()
    assert ran.returncode == 1
    assert "no v5litepod-8 to be had in us-west4-a after 10 tries" in ran.stderr


def test_what_cannot_be_read_is_not_taken_for_missing(cloud):
    cloud.say(slice="READY")
    cloud.cue("tpu-vm describe", *[{"fail": "ERROR: connection reset by peer"}] * 20)
    ran = cloud.launch()
    assert ran.returncode == 1
    assert "cannot find out about one: connection reset by peer" in ran.stderr
    assert cloud.count("create") == 0


def test_slice_of_that_name_is_used(cloud):
    cloud.say(slice="READY")
    assert cloud.launch().returncode == 0
    assert cloud.count("create") == 0
    # Created by somebody else between the look and the request.
    cloud.cue("tpu-vm describe", {"fail": "NOT_FOUND"})
    cloud.ends("0", "0")
    assert cloud.launch().returncode == 0
    assert cloud.count("tpu-vm create") == 1


def test_stopped_slice_is_started(cloud):
    cloud.say(slice="STOPPED")
    assert cloud.launch().returncode == 0
    assert cloud.count("tpu-vm start one") == 1


@pytest.mark.parametrize("call", ["scp", "ssh prepare", "ssh start", "ssh status", "ssh log"])
def test_connection_that_fails_once_is_tried_again(cloud, call):
    cloud.cue(call if " " in call else f"tpu-vm {call}", {"fail": "ssh: connection refused", "status": 255})
    ran = cloud.launch()
    assert ran.returncode == 0, ran.stderr
    assert cloud.starts == [1]
    assert "worker 0 start 0" in ran.stdout


def test_worker_that_never_answers_ends_it(cloud):
    cloud.say(slice="READY", workers=2, silent=[1])
    ran = cloud.launch()
    assert ran.returncode == 1
    assert "a worker of one does not answer: ssh: connection refused" in ran.stderr
    assert "given up after 3 failure(s)" in ran.stderr
    assert "still exists and costs money" in ran.stderr
    assert cloud.starts == []


def test_saved_and_stopped_is_started_again_as_often_as_it_takes(cloud):
    cloud.ends("75", "75", "75", "0")
    ran = cloud.launch()
    assert ran.returncode == 0, ran.stderr
    assert cloud.starts == [4]
    assert [line for line in ran.stdout.splitlines() if "start" in line] == [
        f"worker 0 start {start} of: --workdir=runs/one" for start in range(4)
    ]


def test_bad_input_stops_at_once(cloud):
    cloud.say(workers=2)
    cloud.ends("2")
    ran = cloud.launch()
    assert ran.returncode == 2
    assert "something must be mended" in ran.stderr
    assert cloud.starts == [1, 1]


def test_sick_run_is_not_started_again(cloud):
    cloud.say(workers=2)
    cloud.ends("worker0:70,worker1:hang", "0")
    ran = cloud.launch()
    assert ran.returncode == 70, ran.stderr
    assert "the run is sick (exit status 70)" in ran.stderr
    assert cloud.starts == [1, 1]


def test_worker_that_is_late_is_waited_for_again(cloud):
    cloud.say(workers=2)
    cloud.ends("worker0:69,worker1:hang", "0")
    ran = cloud.launch()
    assert ran.returncode == 0, ran.stderr
    assert "failure 1 of 3 (exit status 69)" in ran.stderr
    assert cloud.starts == [2, 2]


def test_what_keeps_a_worker_from_joining_counts_before_those_who_waited(cloud):
    cloud.say(workers=2)
    cloud.ends("worker0:69,worker1:2", "0")
    assert cloud.launch().returncode == 2
    assert cloud.starts == [1, 1]


def test_failures_are_tried_again_up_to_a_limit(cloud):
    cloud.ends("1", "137", "1", "0")
    ran = cloud.launch()
    assert ran.returncode == 1
    assert "given up after 3 failure(s), the last with exit status 1" in ran.stderr
    assert cloud.starts == [3]


def test_one_worker_that_fails_stops_the_others(cloud):
    cloud.say(workers=2)
    cloud.ends("worker0:1,worker1:hang", "0")
    ran = cloud.launch()
    assert ran.returncode == 0, ran.stderr
    assert "failure 1 of 3 (exit status 1)" in ran.stderr
    assert cloud.starts == [2, 2]


@pytest.mark.parametrize("hears", ["hang", "deaf"])
def test_notice_of_the_cloud_saves_and_nothing_is_started_while_it_stands(cloud, hears):
    cloud.say(slice="READY", workers=2)
    cloud.ends(hears, "0", "0")
    for worker, answers in enumerate([["FALSE", "TRUE", "TRUE", "FALSE"], ["FALSE"]]):
        (cloud.here / str(worker)).mkdir()
        (cloud.here / str(worker) / "notices").write_text("\n".join(answers) + "\n")
    ran = cloud.launch("--max_failures=1")
    assert ran.returncode == 0, ran.stderr
    assert "the cloud takes this machine away (preempted is TRUE)" in ran.stdout
    assert ran.stderr.count("saved and stopped") == 2
    # The other worker is stopped with it, as one that is told by jax.
    assert cloud.starts == [2, 3]


def test_reboot_is_no_failure(cloud):
    cloud.ends("hang", "0")
    arguments = cloud.arguments("--max_failures=1")
    with subprocess.Popen(arguments, env=cloud.environment, stderr=subprocess.PIPE, text=True) as launcher:
        _wait_for_command(cloud)
        pid_file = cloud.here / "0/lm-run/pid"
        pid = pid_file.read_text().split()[0]
        os.killpg(int(pid), signal.SIGKILL)
        pid_file.write_text(f"{pid} boot-before-this-one\n")
        _, error = launcher.communicate(timeout=30)
    assert launcher.returncode == 0, error
    assert "a worker restarted" in error


def _wait_for_command(cloud):
    """Waits until the command runs and its worker has noted which process it is."""
    wanted = (cloud.here / "count.0", cloud.here / "0/lm-run/pid")
    for _ in range(1500):
        if all(path.exists() and path.read_text().strip() for path in wanted):
            return
        signal.sigtimedwait([], 0.02)
    raise AssertionError(f"none of {wanted} came")


def test_launcher_that_dies_leaves_the_command_and_the_next_one_attaches(cloud):
    cloud.say(slice="READY")
    cloud.ends("hang")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(cloud.arguments(), env=cloud.environment, start_new_session=True, **quiet) as launcher:
        _wait_for_command(cloud)
        os.killpg(launcher.pid, signal.SIGKILL)
    scps = cloud.count("scp")
    other = cloud.launch(command=["another"])
    assert other.returncode == 1
    assert "busy with another command" in other.stderr
    with subprocess.Popen(cloud.arguments(), env=cloud.environment, stderr=subprocess.PIPE, text=True) as launcher:
        assert "already runs" in launcher.stderr.readline()
        stopped = cloud.launch("--stop", command=[])
        assert stopped.returncode == 0, stopped.stderr
        _, error = launcher.communicate(timeout=30)
    assert launcher.returncode == 75, error
    assert cloud.starts == [1]
    assert cloud.count("scp") == scps
    assert cloud.count(" delete ") == 0


def test_command_that_does_not_stop_is_killed(cloud):
    cloud.say(slice="READY")
    cloud.ends("stubborn")
    with subprocess.Popen(cloud.arguments(), env=cloud.environment, stderr=subprocess.DEVNULL) as launcher:
        _wait_for_command(cloud)
        assert cloud.launch("--stop", "--grace_seconds=0", command=[]).returncode == 0
        assert launcher.wait(30) == 75
    assert (cloud.here / "0/lm-run/status").read_text() == "137\n"


def test_delete_deletes_and_only_when_asked(cloud):
    cloud.say(slice="READY", queue="ACTIVE")
    ran = cloud.launch("--delete", command=[])
    assert ran.returncode == 0, ran.stderr
    assert (cloud.state["slice"], cloud.state["queue"]) == ("MISSING", "")
    again = cloud.launch("--delete", command=[])
    assert again.returncode == 0, again.stderr


def test_results_that_cannot_be_fetched_are_not_deleted(cloud):
    cloud.cue("tpu-vm scp", None, *[{"fail": "scp: broken pipe"}] * 20)
    ran = cloud.launch("--fetch=got", "--delete_when_done")
    assert ran.returncode == 1
    assert "nothing was deleted" in ran.stderr
    assert cloud.count(" delete ") == 0


def test_results_in_a_bucket_are_fetched_from_there(cloud):
    ran = cloud.launch("--bucket=gs://pail", "--fetch=got", command=["true", "--workdir", "bucket/a/run"])
    assert ran.returncode == 0, ran.stderr
    assert cloud.count(r"storage rsync --recursive gs://pail/a/run got/run$") == 1


USAGE = {
    "--name=Big": "--name=Big must begin with a small letter",
    "--type=h100": "--type=h100 is no TPU type known here",
    "--type=v6e": "is no TPU type known here",
    "--zone": "--zone needs its value after an equals sign: --zone=VALUE",
    "--sport": "there is no option --sport",
    "word": "word is no option; the command to run comes after --",
    "--max_failures=0": "--max_failures must be at least 1",
    "--poll_seconds=-1": "--poll_seconds=-1 is not a whole number",
    "--valid_for=6h": "--valid_for needs --queued",
    "--bucket=pail": "--bucket=pail must be gs://NAME",
    "--bucket=gs://pail/folder": "must be gs://NAME, a bucket without a folder",
    "--delete_when_done": "--delete_when_done would destroy the results",
    "--delete": "--delete takes no command",
    "--fetch_only": "--fetch_only needs --fetch=FOLDER",
}


@pytest.mark.parametrize("option", USAGE)
def test_bad_usage_is_one_sentence(cloud, option):
    ran = cloud.launch(option)
    assert ran.returncode == 2
    assert USAGE[option] in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stdout == ""
    assert cloud.calls == []


COMMANDS = {
    "a bucket's address": (["x", "--workdir=gs://pail/run"], "use --bucket=gs://NAME and --workdir=bucket/RUN"),
    "a bucket that is not mounted": (["x", "--workdir", "bucket/run"], "--workdir=bucket/run needs --bucket=gs://NAME"),
    "no command": ([], "give the command to run after --"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_bad_command_is_one_sentence(cloud, case):
    command, sentence = COMMANDS[case]
    ran = cloud.launch(command=command)
    assert ran.returncode == 2
    assert sentence in ran.stderr
    assert cloud.calls == []


def _shown_commands():
    """Every command of the two walk-throughs, continued lines joined."""
    for page in ("tpu", "gpu"):
        text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
            yield from block.replace("\\\n", " ").splitlines()


@pytest.mark.parametrize("line", [line for line in _shown_commands() if line.startswith("./launch_tpu.sh")])
def test_launches_of_the_walkthrough_are_understood(cloud, line):
    words = shlex.split(line, comments=True)
    ran = subprocess.run(
        [str(SCRIPT), "--dry_run", *words[1:]], env=cloud.environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert cloud.calls == []


@pytest.mark.parametrize("line", [line for line in _shown_commands() if "lm.train" in line])
def test_configs_of_the_walkthrough_exist(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = re.findall(r"--config(?:\.([a-z_.]+))?=('[^']*'|\S+)", line)
    overrides = {path: value.strip("'") for path, value in found if path}
    (config,) = [value for path, value in found if not path]
    problems = resolve(config, overrides, Experiment).problems()
    assert [problem for problem in problems if "no such file" not in problem] == []


def test_help_names_every_option():
    text = subprocess.run([str(SCRIPT), "--help"], capture_output=True, text=True, check=True).stdout
    taken = set(re.findall(r"^ {6}(--[a-z_]+)(?:=\*)?\)", SCRIPT.read_text(), re.MULTILINE)) - {"--"}
    assert len(taken) > 15
    for option in taken:
        assert option in text, option
    assert max(map(len, text.splitlines())) <= 120
    assert textwrap.dedent(text) == text
